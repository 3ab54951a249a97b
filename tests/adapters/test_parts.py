"""What the host store of a split model holds of an adapter."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.adapters.fixtures import HIDDEN, INTERMEDIATE, KV, NUM_LAYERS, SHAPES, open_registry, write_adapter
from toppings.adapters.eviction import make_policy
from toppings.adapters.host_store import HostStore
from toppings.adapters.layout import AdapterLayout, BaseShapes
from toppings.adapters.packed import PackedAdapter
from toppings.adapters.parts import AdapterParts, CutSource, PartOfEntry
from toppings.core import MODULES

COUNT = 2


def halves(size: int) -> list[slice]:
    return [slice(0, size // COUNT), slice(size // COUNT, size)]


def make_parts() -> AdapterParts:
    hidden = slice(0, HIDDEN)
    slices = [
        ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, i), (hidden, i), (i, hidden))
        for q, kv, i in zip(halves(HIDDEN), halves(KV), halves(INTERMEDIATE))
    ]
    sizes = tuple((a.stop - a.start, b.stop - b.start) for a, b in slices[0])
    return AdapterParts(BaseShapes(NUM_LAYERS, sizes), slices)


def matrices(block: torch.Tensor, layout: AdapterLayout, layer: int, module: int) -> list[torch.Tensor]:
    """A [r, in] and B [r, out] of one module."""
    place, sizes = layout.layers[layer], layout.shapes.sizes[module]
    rank, starts = place.ranks[module], (place.a_offsets[module], place.b_offsets[module])
    return [block[s : s + rank * size].view(rank, size) for s, size in zip(starts, sizes)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("modules", [MODULES, ("q_proj", "o_proj"), ("down_proj",)])
def test_each_part_of_each_layer_is_cut_from_the_whole(
    tmp_path: Path, dtype: str, modules: tuple[str, ...]
) -> None:
    registry = open_registry(tmp_path / "state", dtype=dtype)
    record = registry.register("a", write_adapter(tmp_path / "a", modules=modules, rank=3))
    parts, kind = make_parts(), getattr(torch, dtype)
    source = CutSource(registry, parts)
    store = HostStore(2**20, source, make_policy("lru"))
    entry = store.request(record.adapter_id)
    while not entry.is_ready:
        assert entry.error is None
    assert store.try_pin(entry)
    packed = PackedAdapter.open(record.packed_path)
    for layer in range(NUM_LAYERS):
        whole = np.empty(packed.layout.layer_bytes(layer), np.uint8)
        packed.read_layer(layer, whole)
        for number in range(COUNT):
            part = PartOfEntry(entry, parts, number)
            assert part.num_layers_ready == NUM_LAYERS
            block = torch.from_numpy(part.layer_view(layer)).view(kind)
            for m in (MODULES.index(name) for name in modules):
                expected = matrices(torch.from_numpy(whole).view(kind), packed.layout, layer, m)
                found = matrices(block, part.layout, layer, m)
                for ours, its, columns in zip(found, expected, parts.slices[number][m]):
                    assert torch.equal(ours, its[:, columns])
    assert source.device_record(record).num_bytes == PartOfEntry(entry, parts, 0).layout.num_bytes
    assert source.device_record(record).num_bytes < record.num_bytes
    store.close()
    registry.close()


def test_a_damaged_file_is_made_again_while_it_is_cut(tmp_path: Path) -> None:
    registry = open_registry(tmp_path / "state")
    record = registry.register("a", write_adapter(tmp_path / "a", modules=MODULES))
    whole_file = Path(record.packed_path).read_bytes()
    Path(record.packed_path).write_bytes(whole_file[:-200] + bytes(b ^ 1 for b in whole_file[-200:]))
    store = HostStore(2**20, CutSource(registry, make_parts()), make_policy("lru"))
    entry = store.request(record.adapter_id)
    while not entry.is_ready:
        assert entry.error is None
    assert entry.layout.num_layers == COUNT * SHAPES.num_layers
    assert Path(record.packed_path).read_bytes() == whole_file
    store.close()
    registry.close()
