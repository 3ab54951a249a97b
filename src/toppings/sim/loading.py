"""What loads of adapters add to the step that needs them: one function per mode.

A load of `num_layers` equal layers lands layer by layer while the step computes its own, as published for
cold starts: layer i of a load is there at begin + (i + 1) * layer load; a step that starts at 0 and
computes a layer in c reaches layer i at i * c. Times in ns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class LinkLoad:
    """A copy to the device. `num_tokens`: what the step prefills with this adapter."""

    adapter: int
    begin_at: int
    end_at: int
    num_bytes: int
    num_tokens: int = 0


@dataclass(slots=True)
class ColdStep:
    """A step that begins at `start_at` and would take `compute_time` if all its adapters were there."""

    start_at: int
    compute_time: int
    num_layers: int
    cpu_gflops: float
    round_trip_time: float


Exposed = Callable[[Sequence[LinkLoad], ColdStep], int]
"""How much longer the step takes for its loads."""


def cached(loads: Sequence[LinkLoad], step: ColdStep) -> int:
    assert not loads
    return 0


def on_demand(loads: Sequence[LinkLoad], step: ColdStep) -> int:
    """The step waits for all of them before it begins."""
    return max(0, max(load.end_at for load in loads) - step.start_at)


def pipelined(loads: Sequence[LinkLoad], step: ColdStep) -> int:
    """Each layer waits for its own weights.

    The last one to be computed on time decides: with arrivals linear in the layer that is the first or the
    last.
    """
    layer_compute = step.compute_time / step.num_layers
    late = 0.0
    for load in loads:
        layer_load = (load.end_at - load.begin_at) / step.num_layers
        late_first = load.begin_at + layer_load - step.start_at
        late_last = load.end_at - step.start_at - (step.num_layers - 1) * layer_compute
        late = max(late, late_first, late_last)
    return round(late)


def cpu_assisted(loads: Sequence[LinkLoad], step: ColdStep) -> int:
    """A layer that is not there when it is reached is computed on the CPU, which takes its round trip and
    what the device's own work on the layer does not hide.

    FLOP of a layer: tokens * 2 * rank * (in + out), which in 2-byte weights is tokens * bytes of the layer.
    """
    layer_compute = step.compute_time / step.num_layers
    elapsed = 0.0
    for layer in range(step.num_layers):
        away = [load for load in loads if _landed_at(load, layer, step) > elapsed]
        elapsed += layer_compute
        if away:
            flop = sum(load.num_tokens * load.num_bytes for load in away) / step.num_layers
            elapsed += step.round_trip_time + max(0.0, flop / step.cpu_gflops - layer_compute)
    return round(elapsed - step.compute_time)


def _landed_at(load: LinkLoad, layer: int, step: ColdStep) -> float:
    layer_load = (load.end_at - load.begin_at) / step.num_layers
    return load.begin_at + (layer + 1) * layer_load - step.start_at


def auto(loads: Sequence[LinkLoad], step: ColdStep) -> int:
    """Whichever of `pipelined` and `cpu_assisted` is predicted to take less."""
    waiting = pipelined(loads, step)
    return min(waiting, cpu_assisted(loads, step)) if step.cpu_gflops else waiting


MODES: dict[str, Exposed] = {
    "cached": cached,
    "on_demand": on_demand,
    "pipelined": pipelined,
    "cpu_assisted": cpu_assisted,
    "auto": auto,
}
