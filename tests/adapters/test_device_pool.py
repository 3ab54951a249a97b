import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapters.fixtures import NUM_LAYERS, SHAPES
from toppings.adapters import device_pool
from toppings.adapters.device_pool import DevicePool
from toppings.adapters.layout import AdapterLayout

DTYPE = torch.float32


def layout(rank: int, modules: int = 0b0000001) -> AdapterLayout:
    ranks = [rank if modules >> m & 1 else 0 for m in range(7)]
    return AdapterLayout.build([ranks] * NUM_LAYERS, SHAPES, "float32")


def make_pool(capacity_bytes: int, num_slots: int = 8) -> DevicePool:
    return DevicePool(NUM_LAYERS, capacity_bytes, DTYPE, num_slots=num_slots)


def block(pool: DevicePool, slot: int, index: int, adapter: AdapterLayout) -> torch.Tensor:
    start = pool.layer_offset(slot, index)
    return pool.arena[start : start + adapter.layers[index].numel]


def fill(pool: DevicePool, slot: int, adapter: AdapterLayout, value: float) -> None:
    for index in range(NUM_LAYERS):
        block(pool, slot, index, adapter).fill_(value + index)


def assert_filled(pool: DevicePool, slot: int, adapter: AdapterLayout, value: float) -> None:
    for index in range(NUM_LAYERS):
        assert (block(pool, slot, index, adapter) == value + index).all()


def test_table_points_at_each_projection() -> None:
    pool, adapter = make_pool(1 << 16), layout(3, 0b1000010)
    slot = pool.try_place(adapter)
    assert slot is not None
    for index, layer in enumerate(adapter.layers):
        start = pool.layer_offset(slot, index)
        for m in range(7):
            expected = (0, 0, 0)
            if layer.ranks[m]:
                expected = (start + layer.a_offsets[m], start + layer.b_offsets[m], 3)
            assert tuple(pool.table[slot, index, m].tolist()) == expected
    pool.check_integrity()


def test_cpu_table_is_the_device_table_on_the_cpu() -> None:
    pool = make_pool(1 << 16)
    pool.try_place(layout(4))
    assert pool.table_cpu.dtype == np.int64
    assert pool.table.data_ptr() == pool.table_cpu.ctypes.data


def test_freed_slot_is_cleared_from_the_table() -> None:
    pool = make_pool(1 << 16)
    slot = pool.try_place(layout(4))
    assert slot is not None
    pool.free(slot)
    assert not pool.table.any()
    assert pool.used_bytes == 0


def test_adapter_takes_what_its_own_rank_needs() -> None:
    pool = make_pool(1 << 20)
    pool.try_place(layout(8))
    pool.try_place(layout(256))
    assert pool.used_bytes == layout(8).num_bytes + layout(256).num_bytes


def test_full_pool_answers_none() -> None:
    pool = make_pool(layout(8).num_bytes)
    assert pool.try_place(layout(8)) is not None
    assert pool.try_place(layout(1)) is None
    pool.check_integrity()


def test_pool_without_a_free_slot_answers_none() -> None:
    pool = make_pool(1 << 16, num_slots=1)
    assert pool.try_place(layout(1)) is not None
    assert pool.try_place(layout(1)) is None


def fragmented_pool() -> tuple[DevicePool, list[int]]:
    """Full of four rank-4 adapters, of which the first and third are gone; the others hold 100 and 200."""
    pool = make_pool(4 * layout(4).num_bytes)
    slots = [slot for _ in range(4) if (slot := pool.try_place(layout(4))) is not None]
    for value, slot in zip((0, 100, 0, 200), slots):
        fill(pool, slot, layout(4), value)
    pool.free(slots[0])
    pool.free(slots[2])
    return pool, [slots[1], slots[3]]


@pytest.mark.parametrize("move_bytes", [device_pool.MOVE_BYTES, 40])
def test_fragments_that_suffice_in_total_are_joined_and_contents_move_along(
    move_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_pool, "MOVE_BYTES", move_bytes)
    pool, slots = fragmented_pool()
    for slot in slots:
        pool.mark_loaded(slot)
    big = AdapterLayout.build([[24] + [0] * 6, [0] * 7, [0] * 7], SHAPES, "float32")
    assert big.num_bytes == 2 * layout(4).num_bytes
    assert pool.try_place(big) is not None
    assert pool.num_compactions == 1
    pool.check_integrity()
    assert_filled(pool, slots[0], layout(4), 100)
    assert_filled(pool, slots[1], layout(4), 200)


def test_neighbours_that_move_equally_far_move_at_once() -> None:
    moves = [(0, 4, 0), (10, 5, 4), (15, 5, 9), (30, 2, 14), (32, 2, 32), (40, 1, 34), (41, 1, 36)]
    assert device_pool._joined(moves) == [(10, 10, 4), (30, 2, 14), (40, 1, 34), (41, 1, 36)]


def test_blocks_under_load_do_not_move() -> None:
    pool, slots = fragmented_pool()
    places = [pool.layer_offset(slot, index) for slot in slots for index in range(NUM_LAYERS)]
    big = AdapterLayout.build([[24] + [0] * 6, [0] * 7, [0] * 7], SHAPES, "float32")
    assert pool.try_place(big) is None
    assert places == [pool.layer_offset(slot, index) for slot in slots for index in range(NUM_LAYERS)]
    pool.check_integrity()


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 127)), max_size=40))
def test_random_use_keeps_contents_and_finds_room_whenever_the_total_suffices(
    actions: list[tuple[int, int, int]],
) -> None:
    pool = make_pool(40_000)
    held: dict[int, tuple[AdapterLayout, int]] = {}
    for value, (kind, rank, modules) in enumerate(actions):
        if kind == 0 and held:
            slot = sorted(held)[rank % len(held)]
            pool.free(slot)
            del held[slot]
        else:
            adapter = layout(rank, modules)
            fits = adapter.num_bytes <= pool.free_bytes and pool.num_free_slots > 0
            placed = pool.try_place(adapter)
            assert (placed is not None) == fits
            if placed is not None:
                fill(pool, placed, adapter, value * 10)
                pool.mark_loaded(placed)
                held[placed] = (adapter, value * 10)
        pool.check_integrity()
        for slot, (adapter, content) in held.items():
            assert_filled(pool, slot, adapter, content)


def test_pool_too_small_for_anything_is_refused() -> None:
    with pytest.raises(ValueError, match="63 bytes"):
        make_pool(63)
