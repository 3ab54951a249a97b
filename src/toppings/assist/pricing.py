"""What one layer of a cold prefill takes, on the device, over the link and on the CPU."""

from dataclasses import dataclass
from functools import lru_cache

from toppings.adapters.layout import AdapterLayout
from toppings.assist.cost import CostProfile
from toppings.core import GROUPS

MIN_ROWS_PER_WORKER = 13
"""Fewer rows are not worth another worker (and see product.MIN_SLICE_ROWS)."""


@dataclass(frozen=True)
class LayerCosts:
    """One layer of one adapter in a prefill, in ms: the layer's time with its adapter part on the
    device, wholly on the CPU (`cpu_ms`) or shrunk there (`shrink_ms`); what the copies of A and B take;
    and how long results that come back occupy the link. `num_workers`: so many hide the work as well as
    can be. `is_awaited`: the device waits for the layer, whoever computes its projections."""

    device_ms: float
    load_a_ms: float
    load_b_ms: float
    cpu_ms: float
    shrink_ms: float
    cpu_return_ms: float
    shrink_return_ms: float
    num_workers: int
    is_awaited: bool = False

    @property
    def load_ms(self) -> float:
        return self.load_a_ms + self.load_b_ms


@dataclass(frozen=True)
class _RoundTrip:
    """A projection group's way over the workers, and the base product that runs meanwhile, in ms."""

    gemm_ms: float
    cpu_ms: float
    shrink_ms: float
    cpu_return_ms: float
    shrink_return_ms: float
    num_workers: int


@lru_cache(maxsize=1024)
def price_layers(profile: CostProfile, layout: AdapterLayout, num_tokens: int) -> tuple[LayerCosts, ...]:
    """One entry a layer, for a prefill of `num_tokens` of one adapter."""
    costs = {block: _price(profile, layout, layer, num_tokens) for layer, block in enumerate(layout.layers)}
    return tuple(costs[block] for block in layout.layers)


def _price(profile: CostProfile, layout: AdapterLayout, layer: int, num_tokens: int) -> LayerCosts:
    ranks = layout.layers[layer].ranks
    trips = [
        _round_trip(profile, layout, modules, ranks, num_tokens)
        for modules in GROUPS.values()
        if any(ranks[m] for m in modules)
    ]
    device_ms = profile.layer_time_ms(num_tokens)
    num_workers = max((trip.num_workers for trip in trips), default=0)
    num_pieces = num_workers * len(trips)
    a_bytes = layout.layers[layer].numel_a * layout.item_bytes
    return LayerCosts(
        device_ms=device_ms,
        load_a_ms=_link_ms(a_bytes, profile.link_gbps) + 0.5 * profile.copy_ms,
        load_b_ms=_link_ms(layout.layer_bytes(layer) - a_bytes, profile.link_gbps) + 0.5 * profile.copy_ms,
        cpu_ms=_assisted_ms(profile, device_ms, [(t.gemm_ms, t.cpu_ms) for t in trips], num_pieces),
        shrink_ms=_assisted_ms(profile, device_ms, [(t.gemm_ms, t.shrink_ms) for t in trips], num_pieces),
        cpu_return_ms=sum(trip.cpu_return_ms for trip in trips),
        shrink_return_ms=sum(trip.shrink_return_ms for trip in trips),
        num_workers=num_workers,
        is_awaited=layout.is_awaited(layer),
    )


def _assisted_ms(
    profile: CostProfile, device_ms: float, trips: list[tuple[float, float]], num_pieces: int
) -> float:
    """The device's time, longer where cores are shared, plus what base products do not hide of the round
    trips (`trips`: both, in ms); no less than the host takes to queue it all."""
    slowdown = profile.sharing_slowdown if trips else 1.0
    shown_ms = sum(max(0.0, trip_ms - gemm_ms * slowdown) for gemm_ms, trip_ms in trips)
    return max(device_ms * slowdown + shown_ms, profile.queue_layer_ms + num_pieces * profile.queue_piece_ms)


def _round_trip(
    profile: CostProfile,
    layout: AdapterLayout,
    modules: tuple[int, ...],
    ranks: tuple[int, ...],
    num_tokens: int,
) -> _RoundTrip:
    sizes = layout.shapes.sizes
    num_in, rank = sizes[modules[0]][0], sum(ranks[m] for m in modules)
    num_out = sum(sizes[m][1] for m in modules if ranks[m])
    mean_out = sum(ranks[m] * sizes[m][1] for m in modules) // rank  # of a row of the group's B
    gemm_ms = _gemm_ms(profile, layout, modules, num_tokens)
    send_ms, cpu_return_ms, shrink_return_ms = (
        _link_ms(num_tokens * width * layout.item_bytes, profile.result_gbps)
        for width in (num_in, num_out, rank)
    )
    away_ms = profile.round_trip_ms + send_ms

    def full_ms(rows: int) -> float:
        return profile.cpu.ms(rows, rank, num_in, mean_out)

    num_workers = _num_workers(profile, num_tokens, gemm_ms - away_ms - cpu_return_ms, full_ms(0), full_ms(1))
    rows = -(-num_tokens // max(1, num_workers))
    return _RoundTrip(
        gemm_ms=gemm_ms,
        cpu_ms=away_ms + full_ms(rows) + cpu_return_ms,
        shrink_ms=away_ms + profile.cpu.ms(rows, rank, num_in, 0) + shrink_return_ms,
        cpu_return_ms=cpu_return_ms,
        shrink_return_ms=shrink_return_ms,
        num_workers=num_workers,
    )


def _num_workers(
    profile: CostProfile, num_tokens: int, hidden_ms: float, fixed_ms: float, one_row_ms: float
) -> int:
    """ceil(tokens / c), c being the rows that one worker computes while the base product runs
    (`hidden_ms`)."""
    row_ms = max(one_row_ms - fixed_ms, 1e-9)
    rows = max(MIN_ROWS_PER_WORKER, int((hidden_ms - fixed_ms) / row_ms))
    return min(profile.num_workers, -(-num_tokens // rows), max(1, num_tokens // MIN_ROWS_PER_WORKER))


def _gemm_ms(profile: CostProfile, layout: AdapterLayout, modules: tuple[int, ...], num_tokens: int) -> float:
    """The group's base product: its share, by weights, in the layer's time in products of projections."""
    groups = ("qkv", "o") if profile.has_experts else GROUPS
    num_weights = [num_in * num_out for num_in, num_out in layout.shapes.sizes]
    share = sum(num_weights[m] for m in modules) / sum(num_weights[m] for g in groups for m in GROUPS[g])
    return profile.layer_time_ms(num_tokens) * profile.gemm_share * share


def _link_ms(num_bytes: int, gbps: float) -> float:
    """0 for a link of speed 0: there is none to cross."""
    return num_bytes / gbps * 1e-6 if gbps else 0.0
