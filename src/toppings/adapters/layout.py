"""Where an adapter's weights lie: one contiguous block per layer, the same on disk, host and device.

A block is `[A_q A_k A_v A_o A_gate A_up A_down | B_q B_k B_v B_o B_gate B_up B_down | extras]`, targeted
modules only. A is `[r, in]`; B is stored transposed, `[r, out]`, with the adapter's scale folded in. So the
A's of a projection group are consecutive rows, and each half of a block is one copy: extras travel with B.
They are named tensors, which most adapters have none of:

| extra | shape | what it is |
|---|---|---|
| `q_proj.gain`, ... | [out] | the base model's output y becomes y + gain ∘ y |
| `q_proj.offset`, ... | [out] | is added to y |
| `input_layernorm`, `post_attention_layernorm`, ... | [hidden] | stands for the layer's own |
| `q_norm`, `k_norm` | [head], or that of all heads | likewise |

The first layer's block has those of the embedding besides, the last one's those of the end:

| extra | shape | what it is |
|---|---|---|
| `embed_tokens.weight`, `lm_head.weight` | [vocabulary, hidden] | stands for the base model's |
| `embed_tokens.ids`, `lm_head.ids` | int32 [n] | tokens whose rows of it stand in `rows`, ascending |
| `embed_tokens.rows`, `lm_head.rows` | [n, hidden] | |
| `embed_tokens.A`, `embed_tokens.B` | [vocabulary, r], [r, hidden] | LoRA; A has a row per token |
| `lm_head.A`, `lm_head.B` | [r, hidden], [r, vocabulary] | LoRA |
| `embed_tokens.gain`, `lm_head.gain`, `lm_head.offset` | [hidden], [vocabulary] | as above |
| `norm` | [hidden] | stands for the norm behind the last layer |
| `lm_head.tied` | [0] | the output layer has the embedding's own weight or rows |

An adapter with more tokens than the base model has their number in the first block: `vocabulary`, of shape
[n, 0]. What is [vocabulary, ...] above has that many rows, and `ids` name rows up to there.

A layer with experts has those of its own (`ops/experts.py`): a LoRA of every expert, one below the other, and
of the router. An expert with a smaller rank than another's is filled up with zeros.

| extra | shape | what it is |
|---|---|---|
| `experts.gate_proj.A`, ... | [experts, r, in] | LoRA of one projection, or of `gate_up_proj`: both as one |
| `experts.gate_proj.B`, ... | [experts, r, out] | |
| `router.A`, `router.B` | [r, hidden], [r, experts] | LoRA |
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from math import prod
from typing import TypeAlias

from toppings.core import GROUPS, MODULES, Mixture, stored_modules

Extras: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
"""Of one layer: names and shapes."""
LoadOrder = Sequence[tuple[int, str]]
"""The copies of a load, first to last: a layer, and which half of its block travels ("A", "B" or "AB")."""
BLOCK_ALIGNMENT_BYTES = 64
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


EMBED, HEAD, NORM, TIED = "embed_tokens", "lm_head", "norm", "lm_head.tied"
VOCABULARY = "vocabulary"
EXPERTS, ROUTER = "experts", "router"
EXPERT_MODULES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
"""What a LoRA of an expert may be on."""


def expert_name(module: int, half: str) -> str:
    """`module`: an index into `EXPERT_MODULES`; `half`: "A" or "B"."""
    return f"{EXPERTS}.{EXPERT_MODULES[module]}.{half}"


def gain_name(module: int) -> str:
    return f"{MODULES[module]}.gain"


def offset_name(module: int) -> str:
    return f"{MODULES[module]}.offset"


@dataclass(frozen=True)
class BaseShapes:
    """What an adapter must match: the base model's layers and, per `MODULES` index, its (in, out) sizes.
    `is_fused`: its checkpoints have some projections as one (`core.FUSED_MODULES`), which blocks have not;
    `mixture`: the experts that it has in the place of the last three, whose sizes are then each expert's."""

    num_layers: int
    sizes: tuple[tuple[int, int], ...]
    is_fused: bool = field(default=False, compare=False)
    mixture: Mixture | None = field(default=None, compare=False)

    @property
    def stored_modules(self) -> dict[str, tuple[int, ...]]:
        return stored_modules(is_fused=self.is_fused, has_experts=self.mixture is not None)

    def __post_init__(self) -> None:
        assert self.num_layers >= 1
        assert len(self.sizes) == len(MODULES)


@dataclass(frozen=True)
class LayerLayout:
    """One layer's block, in elements. `ranks` is 0 and both offsets are -1 where a module is not targeted."""

    ranks: tuple[int, ...]
    a_offsets: tuple[int, ...]
    b_offsets: tuple[int, ...]
    numel: int  # padded, so that the next block is aligned
    numel_a: int  # the B half starts here
    extras: Extras = ()
    extra_offsets: tuple[int, ...] = ()  # each aligned as a block is

    def find_extra(self, name: str) -> tuple[int, tuple[int, ...]] | None:
        """Its offset and shape."""
        for (known, shape), offset in zip(self.extras, self.extra_offsets, strict=True):
            if known == name:
                return offset, shape
        return None


@lru_cache(maxsize=4096)
def layer_layout(
    ranks: tuple[int, ...], sizes: tuple[tuple[int, int], ...], item_bytes: int, extras: Extras = ()
) -> LayerLayout:
    """The block of one layer whose modules have these ranks (7 of them, in `MODULES` order)."""
    starts_a = [0, *accumulate(r * size[0] for r, size in zip(ranks, sizes, strict=True))]
    starts_b = [0, *accumulate(r * size[1] for r, size in zip(ranks, sizes, strict=True))]
    numel_a = starts_a[-1]
    alignment = BLOCK_ALIGNMENT_BYTES // item_bytes
    ends = list(
        accumulate(
            (_aligned(prod(shape), alignment) for _, shape in extras),
            initial=_aligned(numel_a + starts_b[-1], alignment),
        )
    )
    return LayerLayout(
        ranks=ranks,
        a_offsets=tuple(start if r else -1 for r, start in zip(ranks, starts_a[:-1], strict=True)),
        b_offsets=tuple(numel_a + start if r else -1 for r, start in zip(ranks, starts_b[:-1], strict=True)),
        numel=ends[-1],
        numel_a=numel_a,
        extras=extras,
        extra_offsets=tuple(ends[:-1]),
    )


def _aligned(numel: int, alignment: int) -> int:
    return -(-numel // alignment) * alignment


@dataclass(frozen=True)
class AdapterLayout:
    """All blocks of one adapter; offsets in bytes count from the first block."""

    dtype: str
    shapes: BaseShapes
    layers: tuple[LayerLayout, ...]

    @classmethod
    def build(
        cls,
        ranks: Sequence[Sequence[int]],
        shapes: BaseShapes,
        dtype: str,
        extras: Sequence[Extras] | None = None,
    ) -> "AdapterLayout":
        """`ranks`: per layer and `MODULES` index, 0 where not targeted; `extras`: per layer."""
        assert len(ranks) == shapes.num_layers
        item_bytes = DTYPE_BYTES[dtype]
        extras = extras or [()] * len(ranks)
        blocks = (
            layer_layout(tuple(r), shapes.sizes, item_bytes, each)
            for r, each in zip(ranks, extras, strict=True)
        )
        return cls(dtype, shapes, tuple(blocks))

    def targeted_groups(self) -> list[int]:
        """Of each layer, how many projection groups the adapter changes."""
        return [
            sum(any(layer.ranks[m] for m in modules) for modules in GROUPS.values()) for layer in self.layers
        ]

    def __hash__(self) -> int:
        """Caches of prices and plans ask for it with every cold prefill."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.dtype, self.shapes, self.layers))

    @cached_property
    def max_rank(self) -> int:
        return max(max(layer.ranks) for layer in self.layers)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Names of the modules that are targeted in at least one layer."""
        return tuple(name for m, name in enumerate(MODULES) if any(layer.ranks[m] for layer in self.layers))

    @cached_property
    def groups(self) -> frozenset[str]:
        """Projection groups with a module that is targeted in at least one layer."""
        named = {group: [MODULES[m] for m in modules] for group, modules in GROUPS.items()}
        return frozenset(group for group, names in named.items() if set(names) & set(self.targets))

    @cached_property
    def has_extras(self) -> bool:
        return any(layer.extras for layer in self.layers)

    @cached_property
    def _extra_names(self) -> frozenset[str]:
        return frozenset(name for layer in self.layers for name, _ in layer.extras)

    @cached_property
    def has_columns(self) -> bool:
        """A projection has a gain or an offset."""
        return any(name.split(".")[0] in MODULES for name in self._extra_names)

    @cached_property
    def has_outer(self) -> bool:
        """There are extras beside gains and offsets of projections, and beside those of experts."""
        known = {*MODULES, EXPERTS, ROUTER}
        return any(name.split(".")[0] not in known for name in self._extra_names)

    @cached_property
    def has_experts(self) -> bool:
        """There is a LoRA of experts or of routers."""
        return any(name.split(".")[0] in (EXPERTS, ROUTER) for name in self._extra_names)

    @cached_property
    def has_routers(self) -> bool:
        """There is a LoRA of routers."""
        return any(name.split(".")[0] == ROUTER for name in self._extra_names)

    def is_awaited(self, layer: int) -> bool:
        """It has what the device alone computes: anything beside gains and offsets of projections."""
        return any(name.split(".")[0] not in MODULES for name, _ in self.layers[layer].extras)

    @cached_property
    def outer_ranks(self) -> dict[str, int]:
        """Of what has a LoRA outside the projections: embedding, output layer, experts, routers."""
        return ranks_of_extras(extra for layer in self.layers for extra in layer.extras)

    @property
    def item_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def _offsets_bytes(self) -> tuple[int, ...]:
        return (0, *accumulate(layer.numel * self.item_bytes for layer in self.layers))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_bytes(self) -> int:
        return self._offsets_bytes[-1]

    def layer_bytes(self, layer: int) -> int:
        return self.layers[layer].numel * self.item_bytes

    def layer_offset_bytes(self, layer: int) -> int:
        return self._offsets_bytes[layer]

    def to_json(self) -> str:
        ranks = [layer.ranks for layer in self.layers]
        fields = {"dtype": self.dtype, "sizes": self.shapes.sizes, "ranks": ranks}
        if self.has_extras:
            fields["extras"] = [layer.extras for layer in self.layers]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> "AdapterLayout":
        fields = json.loads(text)
        sizes = tuple((size[0], size[1]) for size in fields["sizes"])
        shapes = BaseShapes(len(fields["ranks"]), sizes)
        extras = [tuple((name, tuple(shape)) for name, shape in each) for each in fields.get("extras", [])]
        return cls.build(fields["ranks"], shapes, fields["dtype"], extras)


def ranks_of_extras(extras: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """The largest of each extra that is a LoRA, whose B is [..., r, out]."""
    ranks: dict[str, int] = {}
    for name, shape in extras:
        if name.endswith(".B"):
            ranks[name[:-2]] = max(shape[-2], ranks.get(name[:-2], 0))
    return ranks


def by_layer(layers: Iterable[int]) -> tuple[tuple[int, str], ...]:
    """Whole blocks, one after another."""
    return tuple((layer, "AB") for layer in layers)


def b_first(num_layers: int) -> tuple[tuple[int, str], ...]:
    """All layers' B, then all layers' A: for a shrink that is computed elsewhere."""
    return tuple((layer, half) for half in "BA" for layer in range(num_layers))
