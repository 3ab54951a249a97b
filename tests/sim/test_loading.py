"""What cold adapters add to a step, by mode; and where a simulated server's adapters are."""

import pytest

from tests.sim.builders import EXTENDED, make_config
from toppings.core import Admission
from toppings.sim.loading import MODES, ColdStep, LinkLoad, auto, cpu_assisted, on_demand, pipelined
from toppings.sim.placement import Pool

LAYERS = 10


def make_step(
    compute: int = 1000, *, cpu_gflops: float = 0.0, round_trip: float = 0.0, at: int = 0
) -> ColdStep:
    return ColdStep(at, compute, LAYERS, cpu_gflops, round_trip)


def make_load(time: int, *, begin_at: int = 0, num_bytes: int = 1000, num_tokens: int = 10) -> LinkLoad:
    return LinkLoad(1, begin_at, begin_at + time, num_bytes, num_tokens)


def test_on_demand_waits_for_the_whole_adapter() -> None:
    assert on_demand([make_load(500)], make_step()) == 500


def test_on_demand_waits_only_for_what_is_left_of_a_load() -> None:
    assert on_demand([make_load(500, begin_at=50)], make_step(at=100)) == 450


def test_a_pipelined_load_that_is_faster_than_the_layers_costs_one_layer_of_it() -> None:
    assert pipelined([make_load(500)], make_step(1000)) == 500 / LAYERS


def test_a_pipelined_load_that_is_slower_costs_what_computing_cannot_hide() -> None:
    assert pipelined([make_load(3000)], make_step(1000)) == 3000 - (LAYERS - 1) * 100


def walk(load: LinkLoad, step: ColdStep) -> float:
    """The step's time, layer by layer."""
    now = 0.0
    for layer in range(LAYERS):
        landed = load.begin_at + (load.end_at - load.begin_at) * (layer + 1) / LAYERS - step.start_at
        now = max(now, landed) + step.compute_time / LAYERS
    return now


@pytest.mark.parametrize("time", [0, 100, 900, 1000, 1100, 5000])
@pytest.mark.parametrize("begin_at", [-800, 0, 300])
def test_pipelined_is_what_a_walk_over_the_layers_gives(time: int, begin_at: int) -> None:
    load, step = make_load(time, begin_at=begin_at), make_step()
    assert pipelined([load], step) == pytest.approx(max(0.0, walk(load, step) - 1000), abs=1)


def test_the_latest_of_several_pipelined_loads_decides() -> None:
    loads = [make_load(500), make_load(500, begin_at=500)]
    assert pipelined(loads, make_step()) == 500 + 500 / LAYERS


def test_a_cpu_that_hides_its_part_behind_the_device_costs_round_trips_alone() -> None:
    # the load takes two layers' time per layer: half of the layers are not there when they are reached
    step = make_step(1000, cpu_gflops=1e6, round_trip=1.0)
    assert cpu_assisted([make_load(20_000)], step) == LAYERS


def test_a_slow_cpu_costs_what_the_device_does_not_hide() -> None:
    # 10 tokens * 1000 bytes / 10 layers = 1000 FLOP a layer at 5 per ns = 200 ns, of which 100 are hidden
    assert cpu_assisted([make_load(100_000)], make_step(1000, cpu_gflops=5.0)) == LAYERS * 100


def test_layers_that_have_landed_are_left_to_the_device() -> None:
    step = make_step(1000, cpu_gflops=1e6, round_trip=1.0)
    assert cpu_assisted([make_load(500)], step) == 1  # only the first is not there in time


def test_auto_is_never_slower_than_waiting_or_the_cpu() -> None:
    for time in (100, 1000, 3000, 10_000):
        for gflops in (0.5, 5.0, 500.0):
            loads, step = [make_load(time)], make_step(cpu_gflops=gflops, round_trip=5.0)
            assert auto(loads, step) == min(pipelined(loads, step), cpu_assisted(loads, step))


def test_auto_without_a_cpu_is_pipelined() -> None:
    assert auto([make_load(3000)], make_step()) == pipelined([make_load(3000)], make_step())


def test_modes_have_the_engines_names() -> None:
    assert set(MODES) == {"cached", "on_demand", "pipelined", "cpu_assisted", "auto"}


# --- placement ---


def make_pool(sizes: list[int], capacity: int, *, host: int = 0, eviction: str = "value") -> Pool:
    config = make_config(
        EXTENDED,
        mode="pipelined",
        device_pool_bytes=capacity,
        host_store_bytes=host,
        eviction=eviction,
    )
    return Pool(config, [f"adapter-{i}" for i in range(len(sizes))], sizes)


def use(pool: Pool, *adapters: int) -> None:
    """Each by one request, one after another."""
    for adapter in adapters:
        assert pool.try_acquire(adapter, 0.0) is Admission.READY
        pool.release(adapter)
        pool.end_loads()


def test_a_load_takes_its_bytes_over_the_link_and_loads_queue() -> None:
    pool = make_pool([24_000, 48_000], 100_000)
    pool.now_ns = 500
    assert [pool.try_acquire(a, 0.0) for a in (0, 1)] == [Admission.READY] * 2
    assert [(load.begin_at, load.end_at) for load in pool.pop_loads()] == [(500, 1500), (1500, 3500)]
    assert pool.pop_loads() == []


def test_a_resident_adapter_is_not_loaded_again() -> None:
    pool = make_pool([10], 100)
    use(pool, 0, 0)
    assert (pool.num_loads, pool.num_hits) == (1, 1)
    pool.check_integrity()


def test_the_least_recently_used_idle_adapter_makes_room() -> None:
    pool = make_pool([40, 40, 40], 100, eviction="lru")
    use(pool, 0, 1, 0, 2)
    assert [pool.holds(a) for a in range(3)] == [True, False, True]
    pool.check_integrity()


def test_the_least_valuable_idle_adapter_makes_room() -> None:
    pool = make_pool([40, 40, 40], 100)
    use(pool, 0, 0, 0, 1, 2)
    assert [pool.holds(a) for a in range(3)] == [True, False, True]
    pool.check_integrity()


def test_an_adapter_is_not_evicted_before_the_step_that_loads_it_has_ended() -> None:
    pool = make_pool([60, 60], 100)
    pool.try_acquire(0, 0.0)
    pool.release(0)
    assert pool.try_acquire(1, 0.0) is Admission.NO_ROOM
    pool.end_loads()
    assert pool.try_acquire(1, 0.0) is Admission.READY
    pool.check_integrity()


def test_adapters_in_use_are_never_evicted() -> None:
    pool = make_pool([60, 60], 100)
    pool.try_acquire(0, 0.0)
    pool.end_loads()
    assert pool.try_acquire(1, 0.0) is Admission.NO_ROOM
    assert pool.victims_for(1) == [0]
    pool.release(0)
    assert pool.try_acquire(1, 0.0) is Admission.READY
    pool.check_integrity()


def test_an_adapter_larger_than_the_pool_can_never_be_served() -> None:
    with pytest.raises(ValueError, match="adapter 0 takes 101 bytes; the pool has 100"):
        make_pool([101], 100).try_acquire(0, 0.0)


def test_an_adapter_on_disk_is_read_before_it_is_admitted() -> None:
    pool = make_pool([1000], 2000, host=2000)
    pool.prefetch(0)
    assert pool.try_acquire(0, 0.0) is Admission.LOADING
    ready_at = pool.next_ready_ns()
    assert ready_at == 1000  # 1 GB/s
    pool.now_ns = ready_at
    assert pool.try_acquire(0, 0.0) is Admission.READY
    assert pool.next_ready_ns() is None


def test_host_memory_evicts_what_was_asked_for_least_recently_but_no_read_under_way() -> None:
    pool = make_pool([600, 600, 600], 2000, host=1200)
    for adapter in (0, 1, 2):
        pool.prefetch(adapter)
    assert pool.on_host() == {"adapter-0", "adapter-1"}  # no room for a third while two are read
    pool.now_ns = 10_000
    pool.prefetch(0)
    pool.prefetch(2)
    assert pool.on_host() == {"adapter-0", "adapter-2"}
