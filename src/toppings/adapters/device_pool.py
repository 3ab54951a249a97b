"""Adapters on the device: one flat arena, each block as long as its ranks need, and a table of offsets.

Does not know adapters' names, uses or worth, and copies no weights in: see manager.py and loader.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from toppings.adapters.allocator import Block, RangeAllocator, plan_compaction
from toppings.adapters.layout import (
    BLOCK_ALIGNMENT_BYTES,
    EXPERT_MODULES,
    VOCABULARY,
    AdapterLayout,
    LayerLayout,
    expert_name,
    gain_name,
    offset_name,
)
from toppings.core import MODULES

MOVE_BYTES = 1 << 25
"""Scratch memory of a compaction, and what it moves at once."""


@dataclass(slots=True)
class _Placement:
    layout: AdapterLayout
    offsets: list[int]  # per layer, in elements; -1 for an empty block
    is_loading: bool = True


class _Table:
    """What kernels read of where a layer's block of a slot has what: int64 `[num_slots, num_layers, ...]` in
    host memory and on the device (on the CPU device: the same memory), zeros where there is nothing."""

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device | str,
        rows_of: Callable[[LayerLayout, int], npt.NDArray[np.int64]],
    ) -> None:
        """`rows_of`: a layer's, whose block starts at an offset."""
        self._host = torch.zeros(shape, dtype=torch.int64)
        self._rows_of = rows_of
        self.device = self._host.to(device)
        self.cpu: npt.NDArray[np.int64] = self._host.numpy()

    def write(
        self, row: int, placement: "_Placement | None", kept: npt.NDArray[np.bool_] | None = None
    ) -> None:
        """`kept` [num_layers, modules]: the others are zeros, too."""
        was_empty = not self.cpu[row].any()
        self.cpu[row] = self._expected(placement, kept)
        if self.device.device.type != "cpu" and not (was_empty and not self.cpu[row].any()):
            # In the order of the compute stream: kernels that are already queued still see the old row. From
            # page-locked memory of its own, which the allocator keeps until the copy is over: the host does
            # not wait for it, and the row is not changed under it.
            self.device[row].copy_(self._host[row].pin_memory(), non_blocking=True)

    def _expected(
        self, placement: "_Placement | None", kept: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.int64] | int:
        if placement is None:
            return 0
        layers = zip(placement.layout.layers, placement.offsets, strict=True)
        rows = np.stack([self._rows_of(layout, offset) for layout, offset in layers])
        if kept is not None:
            rows[~kept] = 0
        return rows

    def check(
        self, row: int, placement: "_Placement | None", kept: npt.NDArray[np.bool_] | None = None
    ) -> None:
        assert (self.cpu[row] == self._expected(placement, kept)).all(), f"a table is wrong in row {row}"

    def check_device(self) -> None:
        assert torch.equal(self.device.cpu(), self._host)


class DevicePool:
    """Slots of adapters in `arena`, a 1-D tensor of the model's dtype that is allocated once.

    `table` is int64 `[num_slots, num_layers, 7, 3]` on the device: (A offset, B offset, rank) of each module,
    in elements of `arena`; rank 0 where not targeted or no adapter. `columns`, int64 `[num_slots, num_layers,
    7, 2]`, has the starts of each module's gain and offset, 0 where there is none; `experts`, int64
    `[num_slots, num_layers, 4, 3]`, for each of `EXPERT_MODULES` what `table` has, of the first expert.
    `table_cpu`, `columns_cpu` and `experts_cpu` are the same in host memory. They change only in `try_place`,
    `free` and `turn`, between forwards.

    The table has a row more, `minus_slot`: modules of one adapter whose B has the opposite sign, which stand
    there in the place of the adapter's own row.

    Not thread-safe: called from the engine's loop alone.
    """

    def __init__(
        self,
        num_layers: int,
        capacity_bytes: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        num_slots: int = 1024,
    ) -> None:
        if capacity_bytes < BLOCK_ALIGNMENT_BYTES:
            raise ValueError(
                f"device pool of {capacity_bytes} bytes; it must have at least {BLOCK_ALIGNMENT_BYTES}"
            )
        self._alignment = BLOCK_ALIGNMENT_BYTES // dtype.itemsize
        capacity = capacity_bytes // BLOCK_ALIGNMENT_BYTES * self._alignment
        self.num_layers = num_layers
        self.num_slots = num_slots
        self.arena = torch.empty(capacity, dtype=dtype, device=device)
        self.minus_slot = num_slots
        size = (num_slots, num_layers)
        table = _Table((num_slots + 1, num_layers, len(MODULES), 3), device, _table_rows)
        columns = _Table((*size, len(MODULES), 2), device, _column_rows)
        experts = _Table((*size, len(EXPERT_MODULES), 3), device, _expert_rows)
        self._tables = (table, columns, experts)
        self.table, self.columns, self.experts = (each.device for each in self._tables)
        self.table_cpu, self.columns_cpu, self.experts_cpu = (each.cpu for each in self._tables)
        self._allocator = RangeAllocator(capacity)
        self._placements: dict[int, _Placement] = {}
        self._turned_slot: int | None = None
        self._is_turned = np.zeros((num_layers, len(MODULES)), np.bool_)
        self._free_slots = list(range(num_slots))[::-1]
        self.num_compactions = 0

    @property
    def capacity_bytes(self) -> int:
        return self._allocator.capacity * self.arena.itemsize

    @property
    def free_bytes(self) -> int:
        return self._allocator.num_free * self.arena.itemsize

    @property
    def used_bytes(self) -> int:
        return self.capacity_bytes - self.free_bytes

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def try_place(self, layout: AdapterLayout) -> int | None:
        """A slot with room for every block of `layout`, its contents undefined and its load yet to come.

        None where no slot or too little room is free, or where blocks under load keep it in fragments: then
        it works once they have landed. Moves blocks (compaction) where only fragments are free.
        """
        assert layout.num_layers == self.num_layers
        sizes = [layer.numel for layer in layout.layers]
        if not self._free_slots or sum(sizes) > self._allocator.num_free:
            return None
        offsets = self._allocator.try_allocate_all(sizes)
        if offsets is None:
            self._compact(sum(sizes))
            offsets = self._allocator.try_allocate_all(sizes)
        if offsets is None:
            return None
        slot = self._free_slots.pop()
        self._placements[slot] = _Placement(layout, offsets)
        self._write_table(slot)
        return slot

    def mark_loaded(self, slot: int) -> None:
        """The slot's copies have landed: its blocks may move from now on."""
        self._placements[slot].is_loading = False

    def free(self, slot: int) -> None:
        assert slot != self._turned_slot
        placement = self._placements.pop(slot)
        self._allocator.free_all(placement.offsets, [layer.numel for layer in placement.layout.layers])
        self._free_slots.append(slot)
        self._write_table(slot)

    def ranks_of(self, slot: int, layer: int) -> tuple[int, ...]:
        """Of the adapter's modules in a layer, 0 where it does not target one."""
        return self._placements[slot].layout.layers[layer].ranks

    def product(self, slot: int, layer: int, module: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of A `[r, in]` and B `[r, out]` of a module that the adapter targets."""
        placement = self._placements[slot]
        layout, (num_in, num_out) = placement.layout.layers[layer], placement.layout.shapes.sizes[module]
        rank, start = layout.ranks[module], placement.offsets[layer]
        a_start, b_start = start + layout.a_offsets[module], start + layout.b_offsets[module]
        a, b = self.arena[a_start : a_start + rank * num_in], self.arena[b_start : b_start + rank * num_out]
        return a.view(rank, num_in), b.view(rank, num_out)

    def turn(self, slot: int, layer: int, modules: Iterable[int]) -> None:
        """Changes the sign of these modules' B, and moves them from the slot's row of the table to that of
        `minus_slot`, or back. Of one slot at a time; what it does is in the order of the device's work."""
        assert self._turned_slot in (None, slot)
        assert not self._placements[slot].is_loading
        for module in modules:
            if self.ranks_of(slot, layer)[module]:
                self.product(slot, layer, module)[1].neg_()
                self._is_turned[layer, module] ^= True
        self._turned_slot = slot
        self._write_table(slot)
        if not self._is_turned.any():
            self._turned_slot = None

    def layer_offset(self, slot: int, layer: int) -> int:
        """Where the block of a layer starts, in elements of `arena`; stays true while the slot is loading."""
        return self._placements[slot].offsets[layer]

    def groups_of(self, slots: Iterable[int]) -> frozenset[str]:
        """The projection groups that any adapter of `slots` changes in any layer; -1 is no adapter."""
        return frozenset().union(*(self._placements[slot].layout.groups for slot in slots if slot >= 0))

    def max_rank_of(self, slots: Iterable[int]) -> int:
        """The largest rank of any module of the adapters of `slots`; -1 is no adapter."""
        return max((self._placements[slot].layout.max_rank for slot in slots if slot >= 0), default=0)

    def has_extras(self, slots: Iterable[int]) -> bool:
        """Any adapter of `slots` has more than A and B; -1 is no adapter."""
        return any(self._placements[slot].layout.has_extras for slot in slots if slot >= 0)

    def has_columns(self, slots: Iterable[int]) -> bool:
        """Any adapter of `slots` has gains or offsets; -1 is no adapter."""
        return any(self._placements[slot].layout.has_columns for slot in slots if slot >= 0)

    def has_outer(self, slots: Iterable[int]) -> bool:
        """Any adapter of `slots` has something outside the projections; -1 is no adapter."""
        return any(self._placements[slot].layout.has_outer for slot in slots if slot >= 0)

    def num_tokens_of(self, slot: int) -> int:
        """Those of the adapter's own vocabulary; 0 where it has as many as the base model."""
        found = self._placements[slot].layout.layers[0].find_extra(VOCABULARY)
        return 0 if found is None else found[1][0]

    def has_experts(self, slots: Iterable[int]) -> bool:
        """Any adapter of `slots` has a LoRA of experts or routers; -1 is no adapter."""
        return any(self._placements[slot].layout.has_experts for slot in slots if slot >= 0)

    def has_routers(self, slots: Iterable[int]) -> bool:
        """Any adapter of `slots` has a LoRA of routers; -1 is no adapter."""
        return any(self._placements[slot].layout.has_routers for slot in slots if slot >= 0)

    def find_extra(self, slot: int, layer: int, name: str) -> torch.Tensor | None:
        """A view of `arena`, where it stays until the pool changes."""
        placement = self._placements[slot]
        if (found := placement.layout.layers[layer].find_extra(name)) is None:
            return None
        offset, shape = found
        start = placement.offsets[layer] + offset
        return self.arena[start : start + math.prod(shape)].view(shape)

    def _ranges(self) -> list[tuple[int, int, int, int]]:
        """(offset, size, slot, layer) of every block, by offset."""
        return sorted(
            (offset, layout.numel, slot, layer)
            for slot, placement in self._placements.items()
            for layer, (offset, layout) in enumerate(
                zip(placement.offsets, placement.layout.layers, strict=True)
            )
            if layout.numel
        )

    def _compact(self, needed: int) -> None:
        ranges = self._ranges()
        blocks = [
            Block(offset, size, not self._placements[slot].is_loading) for offset, size, slot, _ in ranges
        ]
        targets = plan_compaction(blocks, needed)
        moved_slots = set()
        for (offset, _, slot, layer), target in zip(ranges, targets, strict=True):
            if target != offset:
                self._placements[slot].offsets[layer] = target
                moved_slots.add(slot)
        moves = [(offset, size, target) for (offset, size, *_), target in zip(ranges, targets, strict=True)]
        for offset, size, target in _joined(moves):
            for start in range(0, size, step := MOVE_BYTES // self.arena.itemsize):
                num = min(step, size - start)
                # The ranges may overlap, hence the copy in between.
                part = self.arena[offset + start : offset + start + num].clone()
                self.arena[target + start : target + start + num] = part
        self._allocator.reset([(target, block.size) for target, block in zip(targets, blocks, strict=True)])
        for slot in moved_slots:
            self._write_table(slot)
        self.num_compactions += bool(moved_slots)

    def _write_table(self, slot: int) -> None:
        placement, (table, *others) = self._placements.get(slot), self._tables
        for other in others:
            other.write(slot, placement)
        if slot != self._turned_slot:
            table.write(slot, placement)
            return
        table.write(slot, placement, ~self._is_turned)
        table.write(self.minus_slot, placement, self._is_turned)

    def check_integrity(self) -> None:
        """Blocks and free ranges tile the arena, and the table says what the placements say."""
        self._allocator.check_integrity([(offset, size) for offset, size, _, _ in self._ranges()])
        assert sorted([*self._free_slots, *self._placements]) == list(range(self.num_slots))
        table, *others = self._tables
        for slot in range(self.num_slots):
            placement, is_turned = self._placements.get(slot), slot == self._turned_slot
            table.check(slot, placement, ~self._is_turned if is_turned else None)
            for other in others:
                other.check(slot, placement)
        turned = None if self._turned_slot is None else self._placements[self._turned_slot]
        table.check(self.minus_slot, turned, self._is_turned)
        assert (self._turned_slot is None) == (not self._is_turned.any())
        for each in self._tables:
            each.check_device()
        for placement in self._placements.values():
            for layout, offset in zip(placement.layout.layers, placement.offsets, strict=True):
                assert offset % self._alignment == 0 or not layout.numel


def _joined(moves: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """(offset, size, target) of what moves, by offset: neighbours that move equally far as one, since each
    move is two launches on a GPU."""
    joined: list[tuple[int, int, int]] = []
    for offset, size, target in moves:
        if target == offset:
            continue
        if joined:
            before, num, its_target = joined[-1]
            if (before + num, its_target + num) == (offset, target):
                joined[-1] = before, num + size, its_target
                continue
        joined.append((offset, size, target))
    return joined


def _table_rows(layout: LayerLayout, offset: int) -> npt.NDArray[np.int64]:
    """`[7, 3]`: (A offset, B offset, rank) of a block that starts at `offset`, zeros where not targeted."""
    rows = np.array([layout.a_offsets, layout.b_offsets, layout.ranks], dtype=np.int64).T
    rows[:, :2] += offset
    rows[rows[:, 2] == 0] = 0
    return rows


def _column_rows(layout: LayerLayout, offset: int) -> npt.NDArray[np.int64]:
    """`[7, 2]`: (gain's start, offset's start) of a block that starts at `offset`, zeros where there is none:
    what they belong to comes before them, so that no start is 0."""
    rows = np.zeros((len(MODULES), 2), np.int64)
    if layout.extras:
        for module in range(len(MODULES)):
            for i, name in enumerate((gain_name(module), offset_name(module))):
                if (found := layout.find_extra(name)) is not None:
                    rows[module, i] = offset + found[0]
    return rows


def _expert_rows(layout: LayerLayout, offset: int) -> npt.NDArray[np.int64]:
    """`[4, 3]`: (A's start, B's start, rank) of the first expert's modules; as `_column_rows`."""
    rows = np.zeros((len(EXPERT_MODULES), 3), np.int64)
    if layout.extras:
        for module in range(len(EXPERT_MODULES)):
            a, b = (layout.find_extra(expert_name(module, half)) for half in "AB")
            if a is not None and b is not None:
                rows[module] = offset + a[0], offset + b[0], b[1][-2]
    return rows
