"""Tensor parallelism: what each of several processes holds of a base model.

Projections that read the hidden state (q, k, v, gate, up) are split by output, those that write it (o, down)
by input, so that a layer needs one sum over the parts after `o` and one after `down`. A projection's adapter
is cut where its weight is: of `[out, in]`, A `[r, in]` has the input's part and B `[r, out]` the output's. A
part's product with its own A and B is then its share of the whole, and rides on the base product's sum.

The embedding is whole in every part: a step reads few of its rows, and looking them up needs no message. The
output matrix is read whole in every step, so that each part has some rows of it, and logits are gathered.
"""

from dataclasses import dataclass, replace

from toppings.model.config import ModelConfig

SUMMED_GROUPS = ("o", "down")
"""Projection groups that are split by input: their outputs are summed over the parts."""

ModuleSlices = tuple[tuple[slice, slice], ...]
"""Per `core.MODULES` index, which of the whole projection's inputs and outputs a part has."""


@dataclass(frozen=True)
class Part:
    """Part `index` of `num_parts`; `config` describes it as if it were a model of its own."""

    index: int
    num_parts: int
    config: ModelConfig
    slices: ModuleSlices

    @property
    def num_vocab_rows(self) -> int:
        """Rows of the output matrix in every part; the last one's are filled up."""
        return -(-self.config.vocab_size // self.num_parts)


def split_model(config: ModelConfig, num_parts: int) -> tuple[Part, ...]:
    """All parts, first to last. Where key-value heads are fewer than parts, several parts hold the same one.

    Raises ValueError where heads or the feed-forward layer cannot be split so.
    """
    if (problem := _problem(config, num_parts)) is not None:
        sizes = [n for n in range(1, config.num_heads + 1) if _problem(config, n) is None]
        raise ValueError(
            f"tensor_parallel_size is {num_parts}, but the model has {problem}; "
            f"choose one of {', '.join(map(str, sizes))}"
        )
    part = replace(
        config,
        num_heads=config.num_heads // num_parts,
        num_kv_heads=max(1, config.num_kv_heads // num_parts),
        intermediate_size=config.intermediate_size // num_parts,
    )
    return tuple(Part(i, num_parts, part, _slices(config, part, i, num_parts)) for i in range(num_parts))


def _problem(config: ModelConfig, num_parts: int) -> str | None:
    """What cannot be split."""
    if config.num_heads % num_parts:
        return f"{config.num_heads} attention heads"
    if config.num_kv_heads % num_parts and num_parts % config.num_kv_heads:
        return f"{config.num_kv_heads} key-value heads"
    if num_parts > 1 and config.qk_norm == "whole":
        return "norms over all queries and keys of a token"
    if config.intermediate_size % num_parts:
        return f"an intermediate size of {config.intermediate_size}"
    return None


def _slices(config: ModelConfig, part: ModelConfig, index: int, num_parts: int) -> ModuleSlices:
    hidden = slice(0, config.hidden_size)
    q = _nth(index, part.q_size)
    kv_head = index * config.num_kv_heads // num_parts
    kv = slice(kv_head * config.head_dim, kv_head * config.head_dim + part.kv_size)
    inner = _nth(index, part.intermediate_size)
    return (
        (hidden, q),
        (hidden, kv),
        (hidden, kv),
        (q, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    )


def _nth(index: int, size: int) -> slice:
    return slice(index * size, (index + 1) * size)
