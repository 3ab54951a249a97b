"""Random adapters by the thousand, for measuring speed: written packed, and once for all that are alike.

Adapters of one rank are one packed file under many ids, by hard links, and all layers have the same weights:
making them costs seconds where PEFT checkpoints would cost an hour. An engine cannot tell: each has its own
id, and its own room in host memory and on the device.
"""

import os
import uuid
import zlib
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import torch

from toppings.adapters.layout import AdapterLayout
from toppings.adapters.packed import PackedHeader
from toppings.adapters.packed_dir import PackedCandidate
from toppings.adapters.registry import AdapterRecord, AdapterRegistry
from toppings.core import MODULES
from toppings.synth import AdapterShape


def register_random(
    registry: AdapterRegistry, shape: AdapterShape, count: int, *, name: str = "random"
) -> list[AdapterRecord]:
    """`count` adapters `name`-0, `name`-1 … of the registry's dtype, their ranks those of `shape` in turn.

    Raises AdapterExists where a name is taken.
    """
    files = {rank: _write(registry, shape.targets, rank) for rank in set(shape.ranks)}
    ranks = list(islice(cycle(shape.ranks), count))
    try:
        return registry.adopt([(f"{name}-{i}", _linked(*files[rank])) for i, rank in enumerate(ranks)])
    finally:
        for file, _ in files.values():
            file.unlink()


def _write(registry: AdapterRegistry, targets: Sequence[str], rank: int) -> tuple[Path, PackedHeader]:
    """A packed file beside the registry's own, and its header."""
    ranks = [rank if module in targets else 0 for module in MODULES]
    layout = AdapterLayout.build([ranks] * registry.shapes.num_layers, registry.shapes, registry.dtype)
    block = _draw_block(layout)
    crc = zlib.crc32(block)
    digest = f"random-{'-'.join(targets)}-{rank}"
    header = PackedHeader(layout, (crc,) * layout.num_layers, digest, "")
    file = _temporary(registry.state_dir)
    with file.open("xb") as out:
        out.write(header.to_bytes())
        for _ in range(layout.num_layers):
            out.write(block)
    return file, header


def _draw_block(layout: AdapterLayout) -> memoryview:
    """One layer's A, normal with variance 1 / inputs, and B, with variance 1 / rank."""
    place = layout.layers[0]
    block = torch.zeros(place.numel, dtype=getattr(torch, layout.dtype))
    generator = torch.Generator().manual_seed(max(place.ranks))
    for module, rank in enumerate(place.ranks):
        if rank:
            num_in, num_out = layout.shapes.sizes[module]
            for start, width, variance in (
                (place.a_offsets[module], num_in, 1 / num_in),
                (place.b_offsets[module], num_out, 1 / rank),
            ):
                block[start : start + rank * width].normal_(std=variance**0.5, generator=generator)
    return block.view(torch.uint8).numpy().data


def _linked(file: Path, header: PackedHeader) -> PackedCandidate:
    """The same content under a temporary name of its own."""
    link = _temporary(file.parent)
    os.link(file, link)
    return PackedCandidate(header, link, str(file))


def _temporary(directory: Path) -> Path:
    return directory / f"{os.getpid()}-{uuid.uuid4().hex}.tmp"
