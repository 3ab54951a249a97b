"""numba kernels that sort a mixture's rows by expert and find the adapters' weights of each; `experts.py` and
`engine/expert_lora.py` say what for. Of a decode step's few rows this is less work than calling one operator,
so that one thread does it."""

from typing import Any

import numpy as np

from toppings.ops.cpu_bits import int32s, int64s
from toppings.ops.cpu_kernel import Kernel, claim, integer


@Kernel
def group_rows(block: Any) -> None:
    """One task. From experts [T, top_k] and, unless its address is 0, owners [T]: `order` and `keys` [T ·
    top_k] as `GroupedRows` has them, and how many rows each expert has, `counts`."""
    order, keys, counts = int64s(block, 0), int64s(block, 1), int64s(block, 2)
    experts, owners, has_owners = int64s(block, 3), int64s(block, 4), integer(block, 4) != 0
    num_rows, top_k = integer(block, 5), integer(block, 6)
    num_experts, num_owners = integer(block, 7), integer(block, 8)
    while claim(block) >= 0:
        places = np.zeros(num_experts * num_owners + 1, np.int64)  # of a key's next row, one further on
        for i in range(num_rows):
            key = experts[i] * num_owners + (owners[i // top_k] if has_owners else 0)
            places[key + 1] += 1
        for expert in range(num_experts):
            counts[expert] = 0
            for key in range(expert * num_owners, (expert + 1) * num_owners):
                counts[expert] += places[key + 1]
                places[key + 1] += places[key]
        for i in range(num_rows):
            key = experts[i] * num_owners + (owners[i // top_k] if has_owners else 0)
            to = places[key]
            places[key] += 1
            order[to], keys[to] = i, key


@Kernel
def cut_rows(block: Any) -> None:
    """One task. Cuts the rows of `keys` (ascending, expert · num_owners + owner) where the key changes, and
    after `max_rows` in any case: `cuts` [rows, 3] are (start, stop, its own number, or -1 where the owner is
    0), those that are left over (0, 0, -1). Row `number` of `places` [rows, 4, 3] is what `table`
    [slots, 4, 3] of the first expert (slots `slot_stride` apart; `slots`: of the owners from 1 on) is
    for the cut's. Modules: gate, up, down, and gate and up as one."""
    cuts, places, keys, slots = int32s(block, 0), int64s(block, 1), int64s(block, 2), int64s(block, 3)
    table, slot_stride = int64s(block, 4), integer(block, 5)
    hidden, size = integer(block, 6), integer(block, 7)
    num_rows, num_owners, max_rows = integer(block, 8), integer(block, 9), integer(block, 10)
    sizes = ((hidden, size), (hidden, size), (size, hidden), (hidden, 2 * size))  # inputs, outputs
    while claim(block) >= 0:
        number, start = 0, 0
        while start < num_rows:
            key, stop = keys[start], start + 1
            while stop < num_rows and stop - start < max_rows and keys[stop] == key:
                stop += 1
            expert, owner = key // num_owners, key % num_owners
            cuts[3 * number], cuts[3 * number + 1] = np.int32(start), np.int32(stop)
            cuts[3 * number + 2] = np.int32(number if owner else -1)
            for module in range(4 if owner else 0):
                place = slots[owner - 1] * slot_stride + 3 * module
                to = 3 * (4 * number + module)
                before = expert * table[place + 2]
                places[to] = table[place] + before * sizes[module][0]
                places[to + 1] = table[place + 1] + before * sizes[module][1]
                places[to + 2] = table[place + 2]
            number, start = number + 1, stop
        for i in range(number, num_rows):
            cuts[3 * i] = cuts[3 * i + 1] = np.int32(0)
            cuts[3 * i + 2] = np.int32(-1)
