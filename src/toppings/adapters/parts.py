"""Adapters of a model that is split over several processes: how a layer's block is cut.

Packed files hold whole adapters, whatever the number of parts. As the host store's thread reads a layer, it
cuts it: the store then holds one block per layer and part, each in the layout of an adapter of that part of
the model, so that every device loads a layer in one copy, as ever. In host memory an adapter takes more than
when it is whole: A of what is split by output and B of what is split by input are in each part, and so is all
that is outside the projections: embedding and norms are computed by every part, the end by the lead.

Of a product that is summed over the parts, each multiplies its share by the whole gain, and one adds the
offset.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import numpy as np

from toppings.adapters.arena import Bytes
from toppings.adapters.errors import AdapterError
from toppings.adapters.host_entry import HostEntry
from toppings.adapters.host_store import PackedReader
from toppings.adapters.layout import (
    AdapterLayout,
    BaseShapes,
    Extras,
    LayerLayout,
    layer_layout,
    offset_name,
)
from toppings.adapters.packed import PackedAdapter
from toppings.adapters.registry import AdapterRecord, AdapterRegistry
from toppings.core import GROUPS, MODULES
from toppings.model.parts import SUMMED_GROUPS

_ITEMS = {2: "u2", 4: "u4"}
"""Integers of an element's size, in numpy's words."""

Slices: TypeAlias = tuple[tuple[slice, slice], ...]
"""Per `MODULES` index, which of the whole projection's inputs and outputs a part has."""


_SUMMED = frozenset(module for group in SUMMED_GROUPS for module in GROUPS[group])
Items: TypeAlias = np.ndarray[tuple[int], np.dtype[Any]]


def _module_of(extra: str) -> int | None:
    """The `MODULES` index of the projection that it belongs to."""
    name = extra.partition(".")[0]
    return MODULES.index(name) if name in MODULES else None


@dataclass(frozen=True)
class AdapterParts:
    """`shapes` of every part's projections; `slices`, by part, say where in the whole ones they are."""

    shapes: BaseShapes
    slices: Sequence[Slices]

    @property
    def count(self) -> int:
        return len(self.slices)

    def part_layout(self, whole: AdapterLayout) -> AdapterLayout:
        """Of each part of an adapter."""
        ranks = [layer.ranks for layer in whole.layers]
        extras = [self._part_extras(layer.extras) for layer in whole.layers]
        return AdapterLayout.build(ranks, self.shapes, whole.dtype, extras)

    def _part_extras(self, extras: Extras) -> Extras:
        """What belongs to a projection's outputs is cut as these are."""
        modules = [_module_of(name) for name, _ in extras]
        return tuple(
            (name, shape if module is None else (self.shapes.sizes[module][1],))
            for (name, shape), module in zip(extras, modules, strict=True)
        )

    def host_layout(self, whole: AdapterLayout) -> AdapterLayout:
        """Of all parts: block `layer * count + part`."""
        layers = tuple(layer for layer in self.part_layout(whole).layers for _ in range(self.count))
        return AdapterLayout(whole.dtype, replace(self.shapes, num_layers=len(layers)), layers)

    def of_host_layout(self, host: AdapterLayout) -> AdapterLayout:
        """The `part_layout` of an adapter with this `host_layout`."""
        return AdapterLayout(host.dtype, self.shapes, host.layers[:: self.count])

    def cut(self, block: Bytes, whole: LayerLayout, sizes: BaseShapes, item_bytes: int, part: int) -> Bytes:
        """The part's block of a layer, from the whole block."""
        source = block.view(_ITEMS[item_bytes])
        pieces = []
        for half in (0, 1):  # A [r, in] of all modules, then B [r, out]
            starts = (whole.a_offsets, whole.b_offsets)[half]
            for module, (rank, start) in enumerate(zip(whole.ranks, starts, strict=True)):
                if rank:
                    size = sizes.sizes[module][half]
                    matrix = source[start : start + rank * size].reshape(rank, size)
                    pieces.append(matrix[:, self.slices[part][module][half]].reshape(-1))
        matrices = np.concatenate(pieces) if pieces else source[:0]
        if not whole.extras:
            return matrices.view(np.uint8)
        extras = self._part_extras(whole.extras)
        place = layer_layout(whole.ranks, self.shapes.sizes, item_bytes, extras)
        cut = np.zeros(place.numel, source.dtype)
        cut[: len(matrices)] = matrices
        places = zip(extras, place.extra_offsets, whole.extras, whole.extra_offsets, strict=True)
        for (name, shape), to, (_, whole_shape), start in places:
            values = source[start : start + prod(whole_shape)]
            cut[to : to + prod(shape)] = self._cut_extra(name, values, part)
        return cut.view(np.uint8)

    def _cut_extra(self, name: str, values: Items, part: int) -> Items:
        module = _module_of(name)
        if module is None:
            return values
        is_added_once = module in _SUMMED and name == offset_name(module) and part > 0
        return np.zeros_like(values) if is_added_once else values[self.slices[part][module][1]]


class CutPacked:
    """A packed adapter read part by part; blocks as in `host_layout`."""

    def __init__(self, packed: PackedAdapter, parts: AdapterParts) -> None:
        self.layout = parts.host_layout(packed.layout)
        self._packed = packed
        self._parts = parts
        self._layer = -1  # the one that `_block` holds
        self._block = np.empty(0, np.uint8)

    def read_layer(self, layer: int, into: Bytes) -> None:
        """Fills `into` with a block, reading each layer of the file once where blocks are asked for in order.

        Raises PackedFileError where the file is damaged.
        """
        number, part = divmod(layer, self._parts.count)
        whole = self._packed.layout
        if number != self._layer:
            block = np.empty(whole.layer_bytes(number), np.uint8)
            self._packed.read_layer(number, block)
            self._layer, self._block = number, block
        cut = self._parts.cut(self._block, whole.layers[number], whole.shapes, whole.item_bytes, part)
        into[: len(cut)] = cut

    def close(self) -> None:
        self._packed.close()


class CutSource:
    """The registry's packed adapters, cut; what the host store of a split model reads from."""

    def __init__(self, registry: AdapterRegistry, parts: AdapterParts) -> None:
        self._registry = registry
        self._parts = parts

    def open_packed(self, adapter_id: int) -> PackedReader:
        return CutPacked(self._registry.open_packed(adapter_id), self._parts)

    def rebuild(self, adapter_id: int) -> None:
        self._registry.rebuild(adapter_id)

    def device_record(self, record: AdapterRecord) -> AdapterRecord:
        """With the bytes that a part takes; those of the whole, which are more, while its file is missing."""
        try:
            with PackedAdapter.open(record.packed_path) as packed:
                return replace(record, num_bytes=self._parts.part_layout(packed.layout).num_bytes)
        except AdapterError:
            return record


class PartOfEntry:
    """One part of an adapter in host memory: a `LoadSource`."""

    def __init__(self, entry: HostEntry, parts: AdapterParts, part: int) -> None:
        self.adapter_id = entry.adapter_id
        self.layout = parts.of_host_layout(entry.layout)
        self.entry = entry
        self._count = parts.count
        self._part = part

    @property
    def num_layers_ready(self) -> int:
        return self.entry.num_layers_ready // self._count

    @property
    def error(self) -> AdapterError | None:
        return self.entry.error

    def layer_view(self, layer: int) -> Bytes:
        return self.entry.layer_view(layer * self._count + self._part)

    def offsets_of(self, part: int) -> list[int]:
        """Where in the arena another part's blocks are, by layer; true while the entry is pinned."""
        return self.entry.offsets[part :: self._count]
