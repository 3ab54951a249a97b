import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.fixtures import SHAPES, open_registry, write_adapter
from tests.waiting import PATIENCE_S, wait_until
from toppings.adapters import known_records
from toppings.adapters.checkpoint import read_checkpoint
from toppings.adapters.errors import AdapterError, StateError
from toppings.adapters.load_cost import LINK_BYTES
from toppings.adapters.manager import AdapterManager
from toppings.adapters.modes import LOADING_MODES, make_mode
from toppings.adapters.packed import pack_weights
from toppings.adapters.registry import AdapterRecord, AdapterRegistry
from toppings.assist.modes import ASSIST_MODES
from toppings.config import EngineConfig
from toppings.core import Admission

NUM_ADAPTERS = 8
RANKS = {7: 8, 8: 1}  # all others have rank 4
Make = Callable[..., AdapterManager]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[AdapterRegistry]:
    registry = open_registry(tmp_path / "state")
    for i in range(1, NUM_ADAPTERS + 1):
        registry.register(str(i), write_adapter(tmp_path / str(i), rank=RANKS.get(i, 4), seed=i))
    yield registry
    registry.close()


@pytest.fixture
def make(registry: AdapterRegistry) -> Iterator[Make]:
    """A manager whose pool and host store have room for so many rank-4 adapters."""
    managers = []
    size = registry.get("1").num_bytes

    def make_manager(
        device: float = 2, host: float = 8, mode: str = "pipelined", **settings: Any
    ) -> AdapterManager:
        config = EngineConfig(
            mode=mode, device_pool_bytes=int(device * size), host_store_bytes=int(host * size), **settings
        )
        managers.append(AdapterManager(registry, config, make_mode(mode)))
        return managers[-1]

    yield make_manager
    for manager in managers:
        manager.check_integrity()
        manager.close()


def settle(manager: AdapterManager, adapter_id: int) -> Admission:
    """Asks as the engine does, until the answer is not LOADING."""
    answer = Admission.LOADING

    def is_settled() -> bool:
        nonlocal answer
        answer = manager.try_acquire(adapter_id, 0.0)
        return answer is not Admission.LOADING

    wait_until(is_settled)
    return answer


def use(manager: AdapterManager, adapter_id: int) -> None:
    """One request: admitted, loaded, done."""
    assert settle(manager, adapter_id) is Admission.READY
    wait(manager, adapter_id)
    manager.release(adapter_id)


def wait(manager: AdapterManager, adapter_id: int) -> None:
    load = manager.load_of(adapter_id)
    if load is not None:
        load.wait_all()
    manager.poll()


def came(manager: AdapterManager, adapter_id: int) -> bool:
    manager.poll()
    return manager.holds(adapter_id)


def on_device(manager: AdapterManager) -> list[int]:
    return [status.adapter_id for status in manager.status({}) if status.device_layers]


def assert_on_device(manager: AdapterManager, registry: AdapterRegistry, adapter_id: int) -> None:
    """Once it has landed, what the table points at is what the checkpoint says."""
    wait(manager, adapter_id)
    layout, blocks = pack_weights(read_checkpoint(registry.get_by_id(adapter_id).path, SHAPES), "float32")
    slot = manager.slot_of(adapter_id)
    for index, layer in enumerate(layout.layers):
        start = layout.layer_offset_bytes(index) // 4
        a_offset, b_offset, rank = manager.pool.table[slot, index, 0].tolist()
        assert rank == layer.ranks[0]
        size = rank * 32
        assert (manager.pool.arena[a_offset : a_offset + size] == blocks[start : start + size]).all()
        assert (
            manager.pool.arena[b_offset : b_offset + size] == blocks[start + size : start + 2 * size]
        ).all()


# --- the way to the device ---


def test_cold_adapter_is_read_loaded_and_pinned_for_the_request(
    make: Make, registry: AdapterRegistry
) -> None:
    manager = make()
    manager.prefetch(1)
    assert manager.tier_of(1) in ("disk", "host")
    assert settle(manager, 1) is Admission.READY
    assert manager.holds(1)
    wait(manager, 1)
    assert manager.load_of(1) is None
    assert manager.tier_of(1) == "device"
    assert_on_device(manager, registry, 1)
    manager.release(1)


def test_first_ask_does_not_wait_for_the_disk(make: Make) -> None:
    manager = make()
    assert manager.try_acquire(1, 0.0) is Admission.LOADING
    assert settle(manager, 1) is Admission.READY


def test_adapter_on_the_device_is_ready_at_once(make: Make) -> None:
    manager = make()
    use(manager, 1)
    assert manager.try_acquire(1, 0.0) is Admission.READY
    assert manager.load_of(1) is None


def test_idle_adapter_is_evicted_for_another_and_comes_back_whole(
    make: Make, registry: AdapterRegistry
) -> None:
    manager = make(device=2, eviction="lru")
    for adapter_id in (1, 2, 1, 3):
        use(manager, adapter_id)
    assert on_device(manager) == [1, 3]
    assert manager.tier_of(2) == "host"
    assert settle(manager, 2) is Admission.READY
    wait(manager, 2)
    assert_on_device(manager, registry, 2)
    assert manager.load_times(2).tier == "host"


def test_adapter_in_use_is_never_evicted(make: Make, registry: AdapterRegistry) -> None:
    manager = make(device=2)
    assert settle(manager, 1) is Admission.READY
    assert settle(manager, 2) is Admission.READY
    assert settle(manager, 3) is Admission.NO_ROOM
    wait(manager, 1)
    manager.release(1)
    assert settle(manager, 3) is Admission.READY
    assert_on_device(manager, registry, 2)


def test_nothing_is_evicted_where_that_would_not_suffice(make: Make) -> None:
    manager = make(device=2)
    assert settle(manager, 1) is Admission.READY
    use(manager, 2)
    assert settle(manager, 7) is Admission.NO_ROOM  # needs the room of both
    assert on_device(manager) == [1, 2]


def test_adapter_under_load_is_not_evicted_even_if_its_request_is_gone(make: Make) -> None:
    manager = make(device=1, link_gbps=0.0002)  # 0.2 MB/s: a load takes about 15 ms
    assert settle(manager, 1) is Admission.READY
    manager.release(1)  # aborted
    assert manager.load_of(1) is not None
    assert manager.try_acquire(2, 0.0) in (Admission.LOADING, Admission.NO_ROOM)
    assert manager.holds(1)
    wait_until(lambda: manager.try_acquire(2, 0.0) is Admission.READY)
    assert not manager.holds(1)


def test_ranks_share_the_pool_without_padding(make: Make) -> None:
    manager = make(device=3)
    for adapter_id in (7, 1):  # twice as large and once as large: full
        assert settle(manager, adapter_id) is Admission.READY
    assert manager.pool.free_bytes == 0
    assert manager.rank_of(7) == 8


def test_fragments_are_joined_for_a_large_adapter(make: Make, registry: AdapterRegistry) -> None:
    manager = make(device=4, eviction="lru")
    for adapter_id in (1, 2, 3, 4):
        assert settle(manager, adapter_id) is Admission.READY
        wait(manager, adapter_id)
    manager.release(1)
    manager.release(3)
    assert settle(manager, 7) is Admission.READY
    wait(manager, 7)
    assert manager.counters()["pool_compactions"] == 1
    for adapter_id in (2, 4, 7):
        assert_on_device(manager, registry, adapter_id)


# --- what can never work ---


def test_adapter_bigger_than_the_pool_is_an_error_at_once(make: Make) -> None:
    with pytest.raises(AdapterError, match=r"device pool has .*device_pool_bytes"):
        make(device=1).try_acquire(7, 0.0)


def test_adapter_bigger_than_the_host_store_is_an_error_at_once(make: Make) -> None:
    with pytest.raises(AdapterError, match="host_store_bytes"):
        make(device=4, host=1).try_acquire(7, 0.0)


def test_adapter_that_pinned_ones_leave_no_room_for_is_an_error(make: Make) -> None:
    manager = make(device=2)
    manager.set_pinned(1, True)
    with pytest.raises(AdapterError, match="belong to pinned adapters"):
        manager.try_acquire(7, 0.0)


def test_unknown_adapter_is_an_error(make: Make) -> None:
    manager = make()
    with pytest.raises(AdapterError, match="99"):
        manager.tier_of(99)
    with pytest.raises(AdapterError, match="99"):
        manager.try_acquire(99, 0.0)


def test_unreadable_adapter_is_an_error_and_is_tried_again(
    make: Make, registry: AdapterRegistry, tmp_path: Path
) -> None:
    manager = make()
    record = registry.get("1")
    Path(record.packed_path).unlink()
    Path(record.path).rename(tmp_path / "hidden")
    manager.prefetch(1)
    with pytest.raises(AdapterError, match="no adapter directory"):
        settle(manager, 1)
    (tmp_path / "hidden").rename(record.path)
    assert settle(manager, 1) is Admission.READY
    assert_on_device(manager, registry, 1)


def test_damage_found_while_the_load_runs_is_an_error_for_every_request_that_waits(
    make: Make, registry: AdapterRegistry, tmp_path: Path
) -> None:
    manager = make()
    record = registry.get("1")
    data = bytearray(Path(record.packed_path).read_bytes())
    data[-1] ^= 1  # in the last layer: the first ones are copied by then
    Path(record.packed_path).write_bytes(data)
    Path(record.path).rename(tmp_path / "hidden")
    for _ in range(2):
        with pytest.raises(AdapterError):
            settle(manager, 1)
    assert not manager.holds(1)
    assert manager.pool.used_bytes == 0
    use(manager, 2)


# --- who has to leave for whom ---


def test_victims_are_the_least_valuable_in_use_and_no_more_than_needed(make: Make) -> None:
    manager = make(device=3, eviction="lru")
    for adapter_id in (1, 2, 3):
        assert settle(manager, adapter_id) is Admission.READY
    assert settle(manager, 2) is Admission.READY  # used again: the most recent
    assert manager.victims_for(4) == [1]
    assert manager.victims_for(7) == [1, 3]


def test_no_victims_where_idle_adapters_leave_enough_room(make: Make) -> None:
    manager = make(device=2)
    use(manager, 1)
    assert settle(manager, 2) is Admission.READY
    assert manager.victims_for(3) == []


def test_pinned_adapter_is_no_victim(make: Make) -> None:
    manager = make(device=2, eviction="lru")
    manager.set_pinned(1, True)
    assert settle(manager, 1) is Admission.READY
    assert settle(manager, 2) is Admission.READY
    assert manager.victims_for(3) == [2]


# --- pins ---


def test_pinned_adapter_is_loaded_and_stays(make: Make) -> None:
    manager = make(device=2)
    manager.set_pinned(1, True)
    wait_until(lambda: came(manager, 1))
    wait(manager, 1)
    for adapter_id in (2, 3, 4):
        use(manager, adapter_id)
    assert manager.tier_of(1) == "device"
    manager.set_pinned(1, False)
    use(manager, 7)
    assert not manager.holds(1)


def test_pin_waits_for_room(make: Make) -> None:
    manager = make(device=1)
    assert settle(manager, 1) is Admission.READY
    manager.set_pinned(2, True)
    manager.poll()
    assert not manager.holds(2)
    manager.release(1)
    wait_until(lambda: came(manager, 2))


def test_pin_that_can_never_fit_is_refused(make: Make) -> None:
    manager = make(device=2)
    manager.set_pinned(1, True)
    with pytest.raises(AdapterError, match="pinned adapters"):
        manager.set_pinned(7, True)
    manager.set_pinned(2, True)
    with pytest.raises(AdapterError):
        manager.set_pinned(3, True)


def test_adapters_pinned_in_the_registry_are_loaded_at_start(make: Make, registry: AdapterRegistry) -> None:
    registry.set_pinned("3", True)
    manager = make()
    manager.start()
    wait_until(lambda: [s.adapter_id for s in manager.status({}) if s.is_pinned] == [3])


def test_a_pin_outlives_a_read_that_fails(
    make: Make, registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise StateError("the disk does not answer")

    monkeypatch.setattr(registry, "open_packed", fail)
    manager = make(device=2)
    manager.set_pinned(1, True)
    wait_until(lambda: not came(manager, 1) and not manager._pins.pending)
    monkeypatch.undo()
    for adapter_id in (1, 2, 3, 4):
        use(manager, adapter_id)
    assert manager.tier_of(1) == "device"
    assert [s.adapter_id for s in manager.status({}) if s.is_pinned] == [1]


# --- a registry that cannot be read ---


def test_an_adapter_that_cannot_be_looked_up_fails_its_own_request(
    make: Make, registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise StateError("the registry is locked")

    manager = make()
    use(manager, 2)
    monkeypatch.setattr(registry, "get_by_id", fail)
    for ask in (manager.tier_of, lambda i: manager.try_acquire(i, 0.0), manager.rank_of, manager.victims_for):
        with pytest.raises(AdapterError, match="adapter 1 cannot be looked up: the registry is locked"):
            ask(1)
    use(manager, 2)
    monkeypatch.undo()
    use(manager, 1)


def test_records_of_adapters_in_use_stay_at_hand(
    make: Make, registry: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_records, "MAX_CACHED_RECORDS", 2)
    manager = make()
    looked_up: list[int] = []
    get_by_id = registry.get_by_id

    def look_up(adapter_id: int) -> AdapterRecord:
        looked_up.append(adapter_id)
        return get_by_id(adapter_id)

    monkeypatch.setattr(registry, "get_by_id", look_up)
    for adapter_id in range(1, 8):
        assert manager.rank_of(8) == 1
        manager.rank_of(adapter_id)
    assert looked_up == [8, *range(1, 8)]


# --- cached mode ---


def test_cached_mode_has_all_on_the_device_after_start(make: Make, registry: AdapterRegistry) -> None:
    manager = make(device=9, host=2, mode="cached")
    manager.start()
    for adapter_id in range(1, NUM_ADAPTERS + 1):
        assert manager.try_acquire(adapter_id, 0.0) is Admission.READY
        assert manager.load_of(adapter_id) is None
        assert_on_device(manager, registry, adapter_id)
    assert manager.counters()["device_misses"] == 0


def test_cached_mode_refuses_to_start_where_not_all_fit(make: Make) -> None:
    with pytest.raises(AdapterError, match=r"8 adapters take \d+ bytes, but the device pool holds"):
        make(device=3, mode="cached").start()


def test_cached_mode_loads_and_keeps_what_is_registered_later(
    make: Make, registry: AdapterRegistry, tmp_path: Path
) -> None:
    manager = make(device=9.5, mode="cached")
    manager.start()
    small = registry.register("small", write_adapter(tmp_path / "small", rank=1))
    use(manager, small.adapter_id)
    assert any(s.adapter_id == small.adapter_id and s.is_pinned for s in manager.status({}))
    big = registry.register("big", write_adapter(tmp_path / "big", rank=64))
    with pytest.raises(AdapterError, match="pinned"):
        manager.try_acquire(big.adapter_id, 0.0)


# --- removal ---


def test_removal_waits_for_running_requests_and_frees_everything(make: Make) -> None:
    manager = make()
    assert settle(manager, 1) is Admission.READY
    wait(manager, 1)
    manager.request_removal(1)
    assert not manager.is_removed(1)
    manager.release(1)
    wait_until(lambda: manager.is_removed(1))  # the reader may still be closing the file
    assert (manager.pool.used_bytes, manager.host.used_bytes) == (0, 0)
    with pytest.raises(AdapterError, match="removed"):
        manager.try_acquire(1, 0.0)


def test_removal_while_loading_ends_when_the_load_has_landed(make: Make) -> None:
    manager = make(link_gbps=0.0002)
    assert settle(manager, 1) is Admission.READY
    manager.release(1)
    manager.request_removal(1)
    assert not manager.is_removed(1)
    wait_until(lambda: manager.is_removed(1))
    assert (manager.pool.used_bytes, manager.host.used_bytes) == (0, 0)


def test_removal_of_a_pinned_adapter_unpins_it(make: Make) -> None:
    manager = make(device=1)
    manager.set_pinned(1, True)
    manager.request_removal(1)
    wait_until(lambda: manager.is_removed(1))
    use(manager, 2)


def test_adapter_nobody_ever_used_is_removed_at_once(make: Make) -> None:
    manager = make()
    manager.request_removal(1)
    assert manager.is_removed(1)


def test_old_and_new_generation_run_side_by_side(make: Make, registry: AdapterRegistry) -> None:
    manager = make()
    assert settle(manager, 1) is Admission.READY
    write_adapter(Path(registry.get("1").path), rank=3)
    new = registry.register("1", registry.get("1").path, replace=True)
    assert settle(manager, new.adapter_id) is Admission.READY
    wait(manager, new.adapter_id)
    assert manager.slot_of(1) != manager.slot_of(new.adapter_id)
    assert_on_device(manager, registry, new.adapter_id)
    manager.request_removal(1)
    assert not manager.is_removed(1)
    assert (manager.rank_of(1), manager.rank_of(new.adapter_id)) == (4, 3)


# --- figures ---


def test_hits_and_misses_are_counted_per_tier(make: Make) -> None:
    manager = make(device=1)
    use(manager, 1)  # from disk
    use(manager, 1)  # on the device
    use(manager, 2)  # from disk, evicts
    use(manager, 1)  # from the host, evicts
    counters = manager.counters()
    expected = {
        **{"device_hits": 1, "device_misses": 3, "host_hits": 1, "host_misses": 2},
        **{"device_evictions": 2, "adapter_loads": 3, "adapter_reads": 2, "load_errors": 0},
    }
    assert {name: counters[name] for name in expected} == expected
    assert counters["adapter_load_bytes"] == 3 * manager.pool.capacity_bytes


def test_status_tells_where_each_adapter_is(make: Make) -> None:
    manager = make(device=1)
    use(manager, 1)
    assert settle(manager, 2) is Admission.READY
    wait(manager, 2)
    first, second, third = manager.status({3: 5})
    assert (first.is_on_host, first.device_layers, first.num_running) == (True, 0, 0)
    assert (second.device_layers, second.num_layers, second.num_running) == (3, 3, 1)
    assert (third.adapter_id, third.is_on_host, third.num_waiting) == (3, False, 5)


def test_load_times_of_a_read_from_disk_are_positive(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make()
    looks = itertools.count(1)  # at a clock of which every look is later than the last
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(looks)))
    assert settle(manager, 1) is Admission.READY
    wait(manager, 1)
    times = manager.load_times(1)
    assert times.tier == "disk"
    assert times.read_ms > 0
    assert times.copy_ms > 0
    assert 1 < times.host_ready_at < time.perf_counter()


# --- everything at once ---


@pytest.mark.parametrize(("eviction", "link_gbps"), [("value", 0.0), ("lru", 0.01)])
def test_random_requests_over_small_stores_all_end_and_leave_nothing(
    make: Make, registry: AdapterRegistry, eviction: str, link_gbps: float
) -> None:
    manager = make(device=2.5, host=3, eviction=eviction, link_gbps=link_gbps)
    rng = random.Random(0)
    waiting = [rng.randint(1, NUM_ADAPTERS) for _ in range(120)]
    running: list[int] = []
    deadline = time.monotonic() + PATIENCE_S
    while waiting or running:
        assert time.monotonic() < deadline, f"{len(waiting)} requests starve"
        for adapter_id in waiting[:4]:
            manager.prefetch(adapter_id)
            if manager.try_acquire(adapter_id, 0.0) is Admission.READY:
                waiting.remove(adapter_id)
                running.append(adapter_id)
        for adapter_id in list(running):
            if rng.random() < 0.5:
                if rng.random() < 0.7:
                    wait(manager, adapter_id)
                    assert_on_device(manager, registry, adapter_id)
                running.remove(adapter_id)
                manager.release(adapter_id)
        manager.check_integrity()
    counters = manager.counters()
    assert counters["device_hits"] + counters["device_misses"] == 120
    assert all(status.num_running == 0 for status in manager.status({}))


def test_nobody_is_evicted_for_an_adapter_that_the_host_does_not_let_go(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while the store moves it: the idle one would be gone for nothing."""
    manager = make(device=1)
    use(manager, 1)
    wait_until(lambda: manager.host.request(2).is_ready)
    monkeypatch.setattr(manager.host, "try_pin", lambda entry: False)
    assert manager.try_acquire(2, 0.0) is Admission.NO_ROOM
    assert manager.holds(1)
    monkeypatch.undo()
    use(manager, 2)
    assert not manager.holds(1)


def test_a_load_that_nobody_has_measured_costs_by_its_bytes_and_its_link(make: Make) -> None:
    manager, slow = make(device=4), make(device=4, link_gbps=0.001)
    for each in (manager, slow):
        for adapter_id in (1, 7):
            assert settle(each, adapter_id) is Admission.READY
    assert manager.load_tokens(1) > 0.0
    num_bytes = [manager.host_entry_of(adapter_id).layout.num_bytes for adapter_id in (1, 7)]
    per_byte = [manager.load_tokens(i) / n for i, n in zip((1, 7), num_bytes, strict=True)]
    assert per_byte[0] == pytest.approx(per_byte[1])
    assert slow.load_tokens(1) == pytest.approx(manager.load_tokens(1) * LINK_BYTES["cpu"] / 1e6)
    for each in (manager, slow):
        for adapter_id in (1, 7):
            wait(each, adapter_id)
            each.release(adapter_id)


def test_a_mode_that_was_not_calibrated_tells_no_cost(make: Make) -> None:
    manager = make()
    use(manager, 1)
    layout = manager.host_entry_of(1).layout
    modes = {**LOADING_MODES, **ASSIST_MODES}
    assert {name: make_mode().load_tokens(layout) for name, make_mode in modes.items()} == dict.fromkeys(
        modes
    )
