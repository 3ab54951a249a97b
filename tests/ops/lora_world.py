"""Random adapters in a flat arena, as the device pool lays them out."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toppings.core import GROUPS
from toppings.ops.lora import LoraSegments

NUM_LAYERS = 2
POPULARITIES = ("distinct", "uniform", "zipf", "identical", "skewed")


@dataclass
class Pool:
    arena: Tensor
    table: Tensor

    @classmethod
    def random(cls, ranks: list[dict[int, int]], sizes: list[tuple[int, int]], dtype: torch.dtype) -> "Pool":
        """`ranks`: per adapter, the rank of each targeted module; the same in every layer but for one."""
        table = torch.zeros(len(ranks), NUM_LAYERS, 7, 3, dtype=torch.int64)
        blocks, used = [], 0
        for slot, by_module in enumerate(ranks):
            for layer in range(NUM_LAYERS):
                for half in (0, 1):
                    for module, rank in sorted(by_module.items()):
                        block = torch.randn(rank * sizes[module][half]) / sizes[module][half] ** 0.5
                        table[slot, layer, module, half], table[slot, layer, module, 2] = used, rank
                        blocks.append(block)
                        used += block.numel()
        return cls(torch.cat(blocks).to(dtype), table)


def adapter_of_rows(popularity: str, num_rows: int, num_adapters: int) -> list[int]:
    """Which adapter each row uses; rows of one adapter are adjacent, -1 is the base model."""
    generator = torch.Generator().manual_seed(num_rows)
    weights = {
        "uniform": torch.ones(num_adapters),
        "zipf": 1 / torch.arange(1, num_adapters + 1),
        "skewed": torch.tensor([100.0] + [1.0] * (num_adapters - 1)),
    }
    if popularity == "identical":
        return [num_adapters - 1] * num_rows
    if popularity == "distinct":
        chosen = [row % (num_adapters + 1) - 1 for row in range(num_rows)]
    else:
        drawn = torch.multinomial(weights[popularity], num_rows, replacement=True, generator=generator)
        chosen = (drawn - 1).tolist()  # the likeliest choice is the base model
    return sorted(chosen)


def segments_of(adapters: list[int]) -> LoraSegments:
    starts = [i for i, a in enumerate(adapters) if i == 0 or a != adapters[i - 1]]
    return LoraSegments([*starts, len(adapters)], [adapters[i] for i in starts])


def offsets_of(group: str, sizes: list[tuple[int, int]]) -> tuple[list[int], int]:
    """First column of each module, and the width of all."""
    widths = [sizes[module][1] for module in GROUPS[group]]
    return [sum(widths[:i]) for i in range(len(widths))], sum(widths)
