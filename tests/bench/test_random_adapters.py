"""Random adapters that share their files are adapters like any others."""

from pathlib import Path

import pytest

from toppings.adapters.errors import AdapterError
from toppings.adapters.layout import BaseShapes
from toppings.adapters.packed import check_packed
from toppings.adapters.registry import AdapterExists, AdapterRegistry
from toppings.lab.random_adapters import register_random
from toppings.synth import AdapterShape

SHAPES = BaseShapes(3, ((64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)))
SHAPE = AdapterShape(ranks=(4, 8), targets=("q_proj", "down_proj"))


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    return AdapterRegistry(tmp_path, "base", SHAPES, "bfloat16")


def test_each_is_whole_and_of_its_rank(registry: AdapterRegistry) -> None:
    records = register_random(registry, SHAPE, 5, name="x")
    assert [(r.name, r.rank) for r in records] == [("x-0", 4), ("x-1", 8), ("x-2", 4), ("x-3", 8), ("x-4", 4)]
    for record in records:
        header = check_packed(record.packed_path)
        assert header.layout.targets == SHAPE.targets
        assert header.layout.num_bytes == record.num_bytes == 2 * 3 * record.rank * (128 + 160)
        with registry.open_packed(record.adapter_id) as packed:
            assert packed.header == header


def test_those_of_one_rank_take_room_once(registry: AdapterRegistry) -> None:
    records = register_random(registry, SHAPE, 200)
    inodes = {Path(record.packed_path).stat().st_ino for record in records}
    assert len(inodes) == 2
    assert not list(registry.state_dir.glob("*.tmp"))
    registry.remove(records[0].name)
    registry.purge(records[0].adapter_id)
    check_packed(records[2].packed_path)  # the others are untouched


@pytest.mark.parametrize(("name", "error"), [("x", AdapterExists), ("a,b", AdapterError)])
def test_nothing_is_left_of_names_that_cannot_be(
    registry: AdapterRegistry, name: str, error: type[AdapterError]
) -> None:
    register_random(registry, SHAPE, 1, name="x")
    with pytest.raises(error):
        register_random(registry, SHAPE, 2, name=name)
    assert registry.count() == 1
    assert len(list(registry.state_dir.rglob("*.pack"))) == 1
    assert not list(registry.state_dir.rglob("*.tmp"))
