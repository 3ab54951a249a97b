"""Reading a checkpoint's safetensors into the decoder's own tensors, fused, without a second copy in
memory."""

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toppings.core import FUSED_MODULES, GROUPS, MODULES, stored_modules
from toppings.model.config import ModelConfig
from toppings.model.files import FLOATS
from toppings.model.parts import Part
from toppings.model.prequantized import NotHeldError, Packed, open_weights
from toppings.ops.quantized import QuantizedWeight

logger = logging.getLogger(__name__)

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_KEPT = re.compile(r"layers\.\d+\.(experts\.)?(qkv|o|gate_up|down)\.weight|lm_head")
"""Weights that may stay quantised as a checkpoint has them."""
_SKIPPED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Buffers that old checkpoints carry and that follow from config.json."""


@dataclass(frozen=True)
class _Piece:
    """A checkpoint tensor's place: rows `start` on of the decoder's tensor `target`. One of three dimensions
    holds matrices [in, out], which are turned and stand there one below the other."""

    target: str
    start: int
    shape: tuple[int, ...]

    @property
    def target_shape(self) -> tuple[int, ...]:
        if len(self.shape) < 3:
            return self.shape
        num, num_in, num_out = self.shape
        return num * num_out, num_in


def read_weights(
    path: Path | str,
    config: ModelConfig,
    dtype: torch.dtype,
    part: Part | None = None,
    without: Collection[str] = (),
) -> dict[str, Tensor]:
    """The decoder's tensors by name (`layers.0.qkv.weight`, ...), converted to `dtype`, in host memory, but
    for those in `without`.

    With `part`, of the projections no more is read than it has. Where config.json ties the output layer to
    the embedding, the result has an `lm_head` only if the checkpoint stores one that differs: the decoder
    then uses it, as transformers does.

    Raises ValueError where the checkpoint's files or tensors are missing, surplus, damaged or of another
    shape.
    """
    path = Path(path)
    with ExitStack() as stack:
        plan, places = _open(path, config, stack)
        pieces = plan if part is None else _plan_for(part.config, places)
        shapes = _target_shapes(pieces)
        weights: dict[str, Tensor] = {}
        for name, piece in pieces.items():
            if piece.target in without:
                continue
            if piece.target not in weights:
                weights[piece.target] = torch.empty(shapes[piece.target], dtype=dtype)
            rows = weights[piece.target][piece.start : piece.start + piece.target_shape[0]]
            if len(piece.shape) == 3:
                _read_stacked(rows.view(piece.shape[0], -1, piece.shape[1]), places[name], name)
            else:
                rows.copy_(_read(places[name], name, config, part))
    if config.tie_word_embeddings and "lm_head" in weights:
        _drop_copy(path, weights)
    return weights


def read_quantized(path: Path | str, config: ModelConfig, dtype: torch.dtype) -> dict[str, QuantizedWeight]:
    """Of a checkpoint that is quantised already, by the decoder's names, the weights that the forms for 8 and
    4 bits hold exactly; which those are, and why others are none, is in the log.

    Raises ValueError as `read_weights`.
    """
    path = Path(path)
    with ExitStack() as stack:
        plan, places = _open(path, config, stack)
        files: dict[str, list[Any]] = {}
        for name, piece in plan.items():
            files.setdefault(piece.target, []).append(places[name])
        stored = {
            target: of
            for target, of in files.items()
            if _KEPT.fullmatch(target) and any(isinstance(each, Packed) for each in of)
        }
        found: dict[str, QuantizedWeight] = {}
        reasons: dict[str, str] = {}
        for target, of in stored.items():
            try:
                found[target] = _stacked([each for each in of if isinstance(each, Packed)], len(of), dtype)
            except NotHeldError as error:
                reasons[target] = str(error)
    if found:
        kinds = sorted({f"int{each.bits}" for each in found.values()})
        logger.info("%d weights are served as the checkpoint has them, in %s", len(found), ", ".join(kinds))
    if reasons:
        first, reason = next(iter(reasons.items()))
        logger.warning(
            "%d of %d weights that the checkpoint has in 4 or 8 bits are widened to %s as they are read: of"
            " the first, %s, %s",
            *(len(reasons), len(stored), dtype, first, reason),
        )
    return found


def _stacked(files: list[Packed], num_pieces: int, dtype: torch.dtype) -> QuantizedWeight:
    if len(files) < num_pieces:
        raise NotHeldError("not all parts are quantised")
    if (whole := QuantizedWeight.stacked([file.quantized(dtype) for file in files])) is None:
        raise NotHeldError("its parts have other groups, or their inputs in another order")
    return whole


def _open(path: Path, config: ModelConfig, stack: ExitStack) -> tuple[dict[str, _Piece], dict[str, Any]]:
    """What of the checkpoint goes where, and the open file of each tensor. Raises ValueError."""
    places = open_weights(path, stack)
    plan = _plan_for(config, places)
    if any(isinstance(file, Packed) for file in places.values()):
        places = {name: file for name, file in places.items() if not _is_idle_bias(name, plan, file)}
    _check(path, plan, places, config)
    return plan, places


def _is_idle_bias(name: str, plan: dict[str, _Piece], file: Any) -> bool:
    """One that the model does not have and that is 0, as some that quantise write beside every projection."""
    return name not in plan and name.endswith(".bias") and not file.get_tensor(name).any()


def _drop_copy(path: Path, weights: dict[str, Tensor]) -> None:
    if torch.equal(weights["lm_head"], weights["embed"]):
        del weights["lm_head"]
    else:
        logger.warning(
            "%s: config.json says tie_word_embeddings, but the stored lm_head differs from the embedding; "
            "the stored one is used",
            path,
        )


def _read(file: Any, name: str, config: ModelConfig, part: Part | None) -> Tensor:
    module = name.split(".")[-2]
    if part is None or module not in (*MODULES, *FUSED_MODULES):
        tensor: Tensor = file.get_tensor(name)
        return tensor
    cuts, start, sizes = [], 0, config.base_shapes()[1]
    for index in FUSED_MODULES.get(module) or (MODULES.index(module),):
        inputs, outputs = part.slices[index]
        rows = slice(start + outputs.start, start + outputs.stop)
        cuts.append(file.get_slice(name)[(rows, inputs) if name.endswith(".weight") else rows])
        start += sizes[index][1]
    return torch.cat(cuts) if len(cuts) > 1 else cuts[0]


def _read_stacked(target: Tensor, file: Any, name: str) -> None:
    """target: [n, out, in], which the file has as [n, in, out]; one after the other, since each is large."""
    stored = file.get_slice(name)
    for index, matrix in enumerate(target):
        matrix.copy_(stored[index : index + 1][0].t())


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """By name, the shapes of the tensors that `read_weights` gives."""
    return _target_shapes(dict(_plan(config)))


def _plan_for(config: ModelConfig, places: dict[str, Any]) -> dict[str, _Piece]:
    """The plan for the tensors that there are: tied ones may be stored under either name, or both."""
    plan = dict(_plan(config))
    if config.tie_word_embeddings and HEAD in places:
        embed = plan[EMBED]
        if EMBED in places:
            plan[HEAD] = _Piece("lm_head", 0, embed.shape)
        else:
            plan = {HEAD if name == EMBED else name: piece for name, piece in plan.items()}
    return plan


def _target_shapes(plan: dict[str, _Piece]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in plan.values():
        num_rows, *rest = piece.target_shape
        shapes[piece.target] = (piece.start + num_rows, *rest)  # in order: the last one reaches to the end
    return shapes


def _plan(config: ModelConfig) -> Iterator[tuple[str, _Piece]]:
    """Every tensor that the checkpoint must have, by its name there."""
    hidden = (config.hidden_size,)
    yield EMBED, _Piece("embed", 0, (config.vocab_size, *hidden))
    if not config.tie_word_embeddings:
        yield HEAD, _Piece("lm_head", 0, (config.vocab_size, *hidden))
    yield "model.norm.weight", _Piece("norm", 0, hidden)
    for layer in range(config.num_layers):
        yield from _layer_plan(config, f"model.layers.{layer}.", f"layers.{layer}.")
        yield from _expert_plan(config, f"model.layers.{layer}.", f"layers.{layer}.")


def _layer_plan(config: ModelConfig, source: str, target: str) -> Iterator[tuple[str, _Piece]]:
    for norm in config.norms:
        if norm is not None:
            yield f"{source}{norm}.weight", _Piece(f"{target}{norm}", 0, (config.hidden_size,))
    if config.qk_norm:
        is_whole = config.qk_norm == "whole"
        for norm, size in (("q_norm", config.q_size), ("k_norm", config.kv_size)):
            shape = (size if is_whole else config.head_dim,)
            yield f"{source}self_attn.{norm}.weight", _Piece(f"{target}{norm}", 0, shape)
    if config.has_sinks:
        yield f"{source}self_attn.sinks", _Piece(f"{target}sinks", 0, (config.num_heads,))
    _, sizes = config.base_shapes()
    biases = {"qkv": config.qkv_bias, "o": config.o_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}
    stored = stored_modules(is_fused=config.is_fused, has_experts=config.has_experts)
    for name, modules in stored.items():
        group = next(group for group, members in GROUPS.items() if modules[0] in members)
        start = sum(sizes[module][1] for module in GROUPS[group] if module < modules[0])
        num_in, num_out = sizes[modules[0]][0], sum(sizes[module][1] for module in modules)
        yield f"{source}{name}.weight", _Piece(f"{target}{group}.weight", start, (num_out, num_in))
        if biases[group]:
            yield f"{source}{name}.bias", _Piece(f"{target}{group}.bias", start, (num_out,))


def _expert_plan(config: ModelConfig, source: str, target: str) -> Iterator[tuple[str, _Piece]]:
    """All experts one below the other, gate and up of each together."""
    if (names := config.expert_names) is None:
        return
    num, hidden, size = config.num_experts, config.hidden_size, config.intermediate_size
    yield f"{source}{names.router}.weight", _Piece(f"{target}router.weight", 0, (num, hidden))
    gate_up, down = f"{target}experts.gate_up.weight", f"{target}experts.down.weight"
    if names.are_stacked:
        yield f"{source}{names.gate}", _Piece(gate_up, 0, (num, hidden, 2 * size))
        yield f"{source}{names.down}", _Piece(down, 0, (num, size, hidden))
    if config.has_expert_bias:
        yield f"{source}{names.router}.bias", _Piece(f"{target}router.bias", 0, (num,))
        yield f"{source}{names.gate}_bias", _Piece(f"{target}experts.gate_up.bias", 0, (num, 2 * size))
        yield f"{source}{names.down}_bias", _Piece(f"{target}experts.down.bias", 0, (num, hidden))
    for expert in range(0 if names.are_stacked else num):
        start = 2 * expert * size
        yield f"{source}{names.gate.format(expert)}.weight", _Piece(gate_up, start, (size, hidden))
        yield f"{source}{names.up.format(expert)}.weight", _Piece(gate_up, start + size, (size, hidden))
        yield f"{source}{names.down.format(expert)}.weight", _Piece(down, expert * hidden, (hidden, size))


def _check(path: Path, plan: dict[str, _Piece], places: dict[str, Any], config: ModelConfig) -> None:
    if missing := sorted(plan.keys() - places.keys()):
        raise ValueError(f"{path} lacks {len(missing)} tensors, the first is {missing[0]}")
    surplus = sorted(name for name in places.keys() - plan.keys() if not _SKIPPED.fullmatch(name))
    if surplus:
        raise ValueError(
            f"{path} has {len(surplus)} tensors that {config.architecture} with this config.json "
            f"does not use, the first is {surplus[0]}"
        )
    for name, piece in plan.items():
        shape = tuple(places[name].get_slice(name).get_shape())
        if shape != piece.shape:
            raise ValueError(
                f"{name} in {path} has shape {list(shape)}; config.json says {list(piece.shape)}"
            )
        if (kind := places[name].get_slice(name).get_dtype()) not in FLOATS:
            raise ValueError(f"{name} in {path} is of type {kind}; supported: {', '.join(FLOATS)}")
