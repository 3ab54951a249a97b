"""A decoder that holds one part of the model and adds up what all parts computed."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from toppings.model.config import ModelConfig
from toppings.model.decoder import Decoder, _Step
from toppings.model.dummy import dummy_weights
from toppings.model.parts import SUMMED_GROUPS, Part
from toppings.model.weights import read_weights


class PartDecoder(Decoder):
    """A forward is to be run by every part of torch.distributed's default group; all get the whole logits."""

    def __init__(self, part: Part, weights: dict[str, Tensor]) -> None:
        """`weights` as `read_weights` names them, cut to the part but for `embed` and `lm_head`."""
        whole = weights.pop("lm_head", weights["embed"])  # without one, it is tied
        weights["lm_head"] = _vocab_rows(whole, part)
        if part.index:  # a bias of a sum is added once
            for name in [name for name in weights if name.endswith(_SUMMED_BIASES)]:
                del weights[name]
        super().__init__(replace(part.config, tie_word_embeddings=False), weights)
        self._num_parts = part.num_parts

    @classmethod
    def load_part(
        cls, path: Path | str, config: ModelConfig, part: Part, dtype: torch.dtype, device: torch.device | str
    ) -> "PartDecoder":
        """Reads the part alone of a checkpoint directory whose configuration is `config`.

        Raises ValueError as `read_weights`.
        """
        weights = read_weights(path, config, dtype, part)
        return cls(part, {name: weight.to(device) for name, weight in weights.items()})

    @classmethod
    def dummy_part(
        cls, part: Part, dtype: torch.dtype, device: torch.device | str, *, seed: int
    ) -> "PartDecoder":
        """Random weights: the parts differ, but for what all must have alike."""
        weights = dummy_weights(part.config, dtype, device, seed=seed + part.index)
        generator = torch.Generator(device).manual_seed(seed)
        weights["embed"].normal_(generator=generator)
        return cls(part, weights)

    def head(self, hidden: Tensor) -> Tensor:
        """To be asked for by every part, of the same rows."""
        if not hidden.shape[0]:
            return torch.empty(0, self.config.vocab_size, device=hidden.device)
        logits = super().head(hidden)
        parts = [torch.empty_like(logits) for _ in range(self._num_parts)]
        dist.all_gather(parts, logits)
        return torch.cat(parts, dim=1)[:, : self.config.vocab_size]

    def _project(self, step: _Step, index: int, group: str, x: Tensor) -> Tensor:
        y = super()._project(step, index, group, x)
        if group in SUMMED_GROUPS:
            dist.all_reduce(y)
        return y


_SUMMED_BIASES = tuple(f".{group}.bias" for group in SUMMED_GROUPS)


def _vocab_rows(lm_head: Tensor, part: Part) -> Tensor:
    """The part's rows of [vocab, hidden], filled up with zeros; no more of it is kept alive."""
    start = part.index * part.num_vocab_rows
    rows = lm_head[start : start + part.num_vocab_rows]
    return functional.pad(rows, (0, 0, 0, part.num_vocab_rows - rows.shape[0])).clone()
