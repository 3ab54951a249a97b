"""Sums registered adapters into one, from their packed files, a layer at a time.

The arithmetic of `linear`, `ties` and the `dare` methods is on A and B as PEFT has saved them, and defined by
them: another A and B of the same product would give another merge. So they need plain LoRAs of one rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from toppings.adapters.errors import AdapterError
from toppings.adapters.layout import EXPERTS, ROUTER, AdapterLayout, BaseShapes
from toppings.adapters.merges import CAT, ELECTING, FREQUENCY, RANDOM, TIES, Merge
from toppings.adapters.packed import PackedAdapter, PackedHeader, check_magnitudes
from toppings.adapters.peft_kinds import MAX_RANK
from toppings.adapters.records import AdapterRecord
from toppings.core import MODULES

if TYPE_CHECKING:
    import torch

Part: TypeAlias = tuple[AdapterRecord, PackedAdapter]
Pair: TypeAlias = tuple["torch.Tensor", "torch.Tensor"]


class MergePlan:
    """Of `parts`, which are open, in the order of the merge's.

    `merge` tells which generations they are; `header` lacks the blocks' checksums. Raises AdapterError for
    parts that cannot be merged so, before any of their weights is read.
    """

    def __init__(self, merge: Merge, parts: Sequence[Part], shapes: BaseShapes, dtype: str) -> None:
        for record, packed in parts:
            _check_kind(record, packed.header, merge.method)
        headers = [packed.header for _, packed in parts]
        self._parts = parts
        self.merge = replace(
            merge,
            parts=tuple(
                replace(part, adapter_id=record.adapter_id, digest=record.digest, scale=_scale(packed.header))
                for part, (record, packed) in zip(merge.parts, parts, strict=True)
            ),
        )
        rank_of = _total_rank if merge.method == CAT else _common_rank
        ranks = [
            [
                rank_of([h.layout.layers[layer].ranks[m] for h in headers], f"layer {layer} {name}")
                for m, name in enumerate(MODULES)
            ]
            for layer in range(shapes.num_layers)
        ]
        layout = AdapterLayout.build(ranks, shapes, dtype)
        scales = None if merge.method == CAT else tuple(tuple(float(r > 0) for r in each) for each in ranks)
        template = next((h.chat_template for h in headers if h.chat_template is not None), None)
        self.header = PackedHeader(layout, (), self.merge.digest, "", template, scales)

    def blocks(self) -> Iterator[memoryview]:
        """Of one layer after another. Raises AdapterError where a value overflows, PackedFileError for a part
        whose file is damaged."""
        import torch

        layout, dtype = self.header.layout, getattr(torch, self.header.layout.dtype)
        generator = torch.Generator().manual_seed(self.merge.seed or 0)
        for layer, place in enumerate(layout.layers):
            layers = [_LayerWeights(packed, layer) for _, packed in self._parts]
            block = torch.zeros(place.numel, dtype=dtype)
            for module, rank in enumerate(place.ranks):
                if not rank:
                    continue
                a, b = self._merge_module(module, layers, generator)
                check_magnitudes(f"layer {layer} {MODULES[module]} of the merge", a, b, "", layout.dtype)
                for start, values in ((place.a_offsets[module], a), (place.b_offsets[module], b)):
                    block[start : start + values.numel()] = values.reshape(-1)
            yield block.view(torch.uint8).numpy().data

    def _merge_module(
        self, module: int, layers: Sequence["_LayerWeights"], generator: "torch.Generator"
    ) -> Pair:
        """A `[r, in]` and B `[r, out]`, fp32."""
        import torch

        weights = [part.weight for part in self.merge.parts]
        targeted = [(w, layer) for w, layer in zip(weights, layers, strict=True) if layer.ranks[module]]
        if self.merge.method == CAT:
            pairs = [layer.scaled(module) for _, layer in targeted]
            return torch.cat([a for a, _ in pairs]), torch.cat(
                [w * b for (w, _), (_, b) in zip(targeted, pairs, strict=True)]
            )
        totals = torch.tensor([w * layer.scale(module) for w, layer in targeted])  # fp32, as PEFT has them
        roots, combine = totals.abs().sqrt(), _combination(self.merge, generator)
        pairs = [layer.saved(module) for _, layer in targeted]
        a = combine([a for a, _ in pairs], roots.copysign(totals))  # a negative weight's sign is on one side
        return a, combine([b for _, b in pairs], roots).T


class _LayerWeights:
    """One layer of a part."""

    def __init__(self, packed: PackedAdapter, layer: int) -> None:
        import torch

        data = np.empty(packed.layout.layer_bytes(layer), np.uint8)
        packed.read_layer(layer, data)
        self._block = torch.from_numpy(data).view(getattr(torch, packed.layout.dtype))
        self._place = packed.layout.layers[layer]
        self._sizes = packed.layout.shapes.sizes
        self._scales = None if packed.header.scales is None else packed.header.scales[layer]

    @property
    def ranks(self) -> tuple[int, ...]:
        return self._place.ranks

    def scale(self, module: int) -> float:
        assert self._scales is not None  # `_check_kind`
        return self._scales[module]

    def scaled(self, module: int) -> Pair:
        """A `[r, in]` and B `[r, out]` with its scale, fp32."""
        place, rank = self._place, self._place.ranks[module]
        starts = (place.a_offsets[module], place.b_offsets[module])
        a, b = (
            self._block[start : start + rank * size].view(rank, size).float()
            for start, size in zip(starts, self._sizes[module], strict=True)
        )
        return a, b

    def saved(self, module: int) -> Pair:
        """A `[r, in]` and B `[out, r]`, fp32, as PEFT has saved them."""
        a, b = self.scaled(module)
        return a, (b / self.scale(module)).T.contiguous()


Combine: TypeAlias = Callable[[list["torch.Tensor"], "torch.Tensor"], "torch.Tensor"]


def _combination(merge: Merge, generator: "torch.Generator") -> Combine:
    """Of tensors of one shape and a coefficient for each."""
    import torch

    def combine(tensors: list[torch.Tensor], coefficients: torch.Tensor) -> torch.Tensor:
        stacked = torch.stack([_pruned(tensor, merge, generator) for tensor in tensors])
        weighted = stacked * coefficients.view(-1, *[1] * tensors[0].dim())
        if merge.method not in ELECTING:
            return weighted.sum(0)
        votes = stacked.sign() if merge.majority_sign == FREQUENCY else stacked
        elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
        agreeing = stacked.sign() == elected
        return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)

    return combine


def _pruned(tensor: "torch.Tensor", merge: Merge, generator: "torch.Generator") -> "torch.Tensor":
    import torch

    density = merge.density
    if density is None or density >= 1:
        return tensor
    if merge.method in RANDOM:
        mask = torch.bernoulli(torch.full_like(tensor, density), generator=generator)
        return tensor * mask / density
    assert merge.method == TIES
    flat = tensor.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel())).indices
    pruned = torch.zeros_like(flat)
    pruned[kept] = flat[kept]
    return pruned.view_as(tensor)


def _total_rank(ranks: Sequence[int], where: str) -> int:
    if sum(ranks) > MAX_RANK:
        raise AdapterError(
            f"{where}: the parts' ranks add up to {sum(ranks)}; at most {MAX_RANK} is served. Methods other "
            f"than {CAT!r} keep the rank"
        )
    return sum(ranks)


def _common_rank(ranks: Sequence[int], where: str) -> int:
    found = sorted({rank for rank in ranks if rank})
    if len(found) > 1:
        raise AdapterError(
            f"{where}: the parts have ranks {', '.join(map(str, found))}; methods other than {CAT!r} need one"
        )
    return found[0] if found else 0


def _check_kind(record: AdapterRecord, header: PackedHeader, method: str) -> None:
    """Raises AdapterError for an adapter that no weighted sum of products of A and B can stand for."""
    if record.invocation_tokens:
        raise AdapterError(
            f"adapter {record.name!r} is an activated LoRA, which acts on a part of the prompt alone; it "
            "cannot be merged"
        )
    if record.vocabulary is not None and record.vocabulary.tokens:
        raise AdapterError(
            f"adapter {record.name!r} has tokens of its own, which its sum with others would not have; it "
            "cannot be merged"
        )
    if (extra := next((name for each in header.layout.layers for name, _ in each.extras), None)) is not None:
        raise AdapterError(
            f"adapter {record.name!r} has {_named(extra)} beside A and B, which has no weighted sum; only "
            "adapters that are A and B alone can be merged"
        )
    if method != CAT and header.scales is None:
        raise AdapterError(
            f"adapter {record.name!r} is no plain LoRA, or was registered by an earlier version: its A and B"
            f" are not known as they were trained, which {method!r} needs; merge by {CAT!r}, or load it again"
        )


def _named(extra: str) -> str:
    module, _, kind = extra.partition(".")
    if module in MODULES:
        return f"{extra} (DoRA)" if kind == "gain" else f"{extra} (lora_bias or DoRA)"
    if module in (EXPERTS, ROUTER):
        return f"{extra} (LoRA of experts or routers)"
    return f"{extra} (modules_to_save, trained tokens or a LoRA outside the projections)"


def _scale(header: PackedHeader) -> float | None:
    """The one of all projections."""
    found = {scale for each in header.scales or () for scale in each if scale}
    return found.pop() if len(found) == 1 else None
