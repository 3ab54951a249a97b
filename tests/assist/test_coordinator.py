"""Whatever is computed where, the outputs are those of an adapter that was on the device all along."""

import random

import pytest
import torch

from tests.assist.world import NUM_LAYERS, World, assert_same, cold, expected, forward
from toppings.adapters.layout import AdapterLayout
from toppings.assist.coordinator import ColdAdapter, Coordinator, split_rows
from toppings.assist.cost import CostProfile
from toppings.assist.plan import Choice
from toppings.assist.pricing import LayerCosts, price_layers
from toppings.assist.product import MIN_SLICE_ROWS
from toppings.ops.lora import LoraSegments

ALL = (1, 1, 1, 1, 1, 1, 1)


def ranks_of(rank: int, targets: tuple[int, ...] = ALL) -> list[int]:
    return [rank * is_targeted for is_targeted in targets]


@pytest.mark.parametrize("choice", [Choice.CPU, Choice.CPU_SHRINK])
@pytest.mark.parametrize("rank", [1, 8, 64, 256])
@pytest.mark.parametrize("num_rows", [1, 12, 13, 27, 600])
def test_a_cold_adapter_gives_what_a_warm_one_gives(
    world: World, coordinator: Coordinator, choice: Choice, rank: int, num_rows: int
) -> None:
    load = world.add_adapter(ranks_of(rank))
    segments = LoraSegments([0, num_rows], [load.slot])
    if choice is Choice.CPU_SHRINK:
        for layer in range(NUM_LAYERS):
            load.land(layer, "B")
    with coordinator.step(segments, [cold(load, choice)]) as lora:
        got = forward(lora, segments, world.dtype)
    assert load.num_waits == 0
    assert lora.stats.num_cpu_products == lora.stats.num_cold_products == 4 * NUM_LAYERS
    assert lora.stats.num_recomputed == 0
    assert_same(got, expected(world, [load], segments), world.dtype)


@pytest.mark.parametrize(
    "targets", [(1, 0, 0, 0, 0, 0, 0), (1, 0, 1, 0, 0, 0, 0), (0, 0, 0, 1, 0, 1, 0), (0, 1, 1, 0, 1, 0, 1)]
)
def test_any_subset_of_projections_may_be_targeted(
    world: World, coordinator: Coordinator, targets: tuple[int, ...]
) -> None:
    load = world.add_adapter(ranks_of(16, targets))
    segments = LoraSegments([0, 40], [load.slot])
    with coordinator.step(segments, [cold(load)]) as lora:
        got = forward(lora, segments, world.dtype)
    assert load.num_waits == 0
    assert_same(got, expected(world, [load], segments), world.dtype)


def test_a_cold_prefill_is_priced_once(
    world: World, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by layer and projection group."""
    load = world.add_adapter(ranks_of(16))
    segments = LoraSegments([0, 40], [load.slot])
    asked: list[tuple[AdapterLayout, int]] = []

    def price(profile: CostProfile, layout: AdapterLayout, num_tokens: int) -> tuple[LayerCosts, ...]:
        asked.append((layout, num_tokens))
        return price_layers(profile, layout, num_tokens)

    monkeypatch.setattr("toppings.assist.coordinator.price_layers", price)
    with coordinator.step(segments, [cold(load)]) as lora:
        forward(lora, segments, world.dtype)
    assert lora.stats.num_cpu_products == 4 * NUM_LAYERS
    assert [layout for layout, _ in asked] == [load.entry.layout]
    num_priced = price_layers.cache_info().misses
    with coordinator.step(segments, [cold(load)]) as lora:
        forward(lora, segments, world.dtype)
    assert price_layers.cache_info().misses == num_priced, "the next prefill is priced anew"


def test_a_result_of_another_width_than_its_modules_is_no_part_of_the_sum(
    world: World, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = world.add_adapter(ranks_of(16))
    segments = LoraSegments([0, 40], [load.slot])
    monkeypatch.setattr(torch, "split", lambda result, widths, dim: result.split(widths, dim)[:-1])
    with coordinator.step(segments, [cold(load)]) as lora, pytest.raises(ValueError, match="shorter"):
        forward(lora, segments, world.dtype)


@pytest.mark.parametrize("seed", range(4))
def test_cold_warm_and_base_rows_mix_while_weights_land(
    world: World, coordinator: Coordinator, seed: int
) -> None:
    chance = random.Random(seed)
    loads = [world.add_adapter([chance.choice((0, 1, 4, 16, 48)) for _ in range(6)] + [8]) for _ in range(5)]
    warm, cold_loads = loads[:2], loads[2:]
    for load in warm:
        for layer in range(NUM_LAYERS):
            load.land(layer, "AB")
    slots = [load.slot for load in loads for _ in range(2)] + [-1, -1]
    chance.shuffle(slots)
    indptr = [0]
    for _ in slots:
        indptr.append(indptr[-1] + chance.choice((1, 2, 9, 30, 70)))
    segments = LoraSegments(indptr, slots)
    adapters = []
    for load in cold_loads:
        for layer in range(NUM_LAYERS):
            load.land(layer, chance.choice(("", "", "B", "AB")))
        choices = [chance.choice(list(Choice)) for _ in range(NUM_LAYERS)]
        adapters.append(ColdAdapter(load.slot, load.slot, load, load.entry, choices))
    with coordinator.step(segments, adapters) as lora:
        got = forward(lora, segments, world.dtype)
    assert_same(got, expected(world, loads, segments), world.dtype)


def test_a_layer_that_landed_is_computed_on_the_device(world: World, coordinator: Coordinator) -> None:
    load = world.add_adapter(ranks_of(8))
    load.land(1, "AB")
    segments = LoraSegments([0, 30], [load.slot])
    with coordinator.step(segments, [cold(load)]) as lora:
        got = forward(lora, segments, world.dtype)
    assert (lora.stats.num_cpu_products, lora.stats.num_cold_products) == (8, 12)
    assert_same(got, expected(world, [load], segments), world.dtype)


def test_an_adapter_that_lands_between_two_groups_changes_over(
    world: World, coordinator: Coordinator
) -> None:
    load = world.add_adapter(ranks_of(8))
    segments = LoraSegments([0, 30], [load.slot])
    with coordinator.step(segments, [cold(load)]) as lora:
        finish = lora.finish

        def land_after_the_first_group(layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> None:
            finish(layer, group, x, y)
            load.land(layer, "AB")

        lora.finish = land_after_the_first_group  # type: ignore[method-assign]
        got = forward(lora, segments, world.dtype)
    assert lora.stats.num_cpu_products == NUM_LAYERS
    assert_same(got, expected(world, [load], segments), world.dtype)


def test_the_device_waits_where_the_plan_says_so(world: World, coordinator: Coordinator) -> None:
    load = world.add_adapter(ranks_of(8))
    segments = LoraSegments([0, 30], [load.slot])
    with coordinator.step(segments, [cold(load, Choice.DEVICE)]) as lora:
        got = forward(lora, segments, world.dtype)
    assert load.num_waits == NUM_LAYERS
    assert lora.stats.num_cpu_products == 0
    assert_same(got, expected(world, [load], segments), world.dtype)


def test_a_layer_that_the_disk_has_not_delivered_is_waited_for(
    world: World, coordinator: Coordinator
) -> None:
    load = world.add_adapter(ranks_of(8))
    load.entry.num_layers_ready = 1
    segments = LoraSegments([0, 30], [load.slot])
    with coordinator.step(segments, [cold(load)]) as lora:
        got = forward(lora, segments, world.dtype)
    assert load.num_waits == NUM_LAYERS - 1
    assert_same(got, expected(world, [load], segments), world.dtype)


def test_nobody_waits_for_layers_that_hold_nothing(world: World, coordinator: Coordinator) -> None:
    load = world.add_adapter(ranks_of(8, (1, 1, 1, 0, 0, 0, 0)))
    segments = LoraSegments([0, 30], [load.slot])
    with coordinator.step(segments, [cold(load, Choice.DEVICE)]) as lora:
        x, y = torch.zeros(30, 96, dtype=world.dtype), torch.zeros(30, 96, dtype=world.dtype)
        lora.start(0, "o", x)
        lora.finish(0, "o", x, y)
    assert load.num_waits == 0


@pytest.mark.parametrize("num_rows", [1, 13, 25, 26, 27, 64, 600])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 16])
def test_rows_are_split_evenly_into_pieces_of_a_least_length(num_rows: int, num_parts: int) -> None:
    pieces = split_rows(7, 7 + num_rows, num_parts)
    lengths = [stop - start for start, stop in pieces]
    assert [start for start, _ in pieces] == [7, *[stop for _, stop in pieces[:-1]]]
    assert sum(lengths) == num_rows
    assert max(lengths) - min(lengths) <= 1
    assert len(pieces) <= num_parts
    assert len(pieces) == 1 or min(lengths) >= MIN_SLICE_ROWS
