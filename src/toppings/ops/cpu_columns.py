"""numba kernel for columns' gains and offsets; `columns.py` says what it computes."""

from typing import Any

from toppings.ops.cpu_bits import elements, int32s, int64s, load, store
from toppings.ops.cpu_kernel import Kernel, claim, integer


@Kernel
def adjust_columns(block: Any) -> None:
    """Task: one module for the rows of one block of few rows."""
    y, arena = elements(block, 0), elements(block, 1)
    places, slot_stride = int64s(block, 2), integer(block, 3)  # (gain, offset) of each module, slot to slot
    segments, offsets = int32s(block, 4), int64s(block, 5)  # (start, stop, slot) each; columns of each module
    num_modules, y_stride = integer(block, 6), integer(block, 7)
    task = claim(block)
    while task >= 0:
        segment, module = task // num_modules * 3, task % num_modules
        place = load(segments, segment + 2) * slot_stride + module * 2
        gain, offset = load(places, place), load(places, place + 1)
        column, stop = load(offsets, module), load(offsets, module + 1)
        for row in range(load(segments, segment), load(segments, segment + 1)):
            to = row * y_stride + column
            if gain and offset:
                for i in range(stop - column):
                    value = load(y, to + i)
                    store(y, to + i, value + value * load(arena, gain + i) + load(arena, offset + i))
            elif gain:
                for i in range(stop - column):
                    value = load(y, to + i)
                    store(y, to + i, value + value * load(arena, gain + i))
            elif offset:
                for i in range(stop - column):
                    store(y, to + i, load(y, to + i) + load(arena, offset + i))
        task = claim(block)
