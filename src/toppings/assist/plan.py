"""Which layers of a cold prefill the CPU should compute, and in what order the weights should travel.

Pure arithmetic on a `CostProfile`: no torch, no clock.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import groupby

from toppings.adapters.layout import AdapterLayout, b_first, by_layer
from toppings.assist.cost import CostProfile
from toppings.assist.pricing import LayerCosts, price_layers

GRID = 16
"""Group sizes are tried in steps of a sixteenth of the layers (each size below 17 layers)."""
TOKEN_STEP = 16
"""Plans are made, and kept, for token counts rounded up to this."""
MIN_GAIN = 0.02
"""The CPU is used where it makes the whole prefill faster by this share: predictions are no better than
that."""

Step = tuple[int, str]
"""One copy of a load: a layer and its half, "A", "B" or "AB"."""


class Choice(IntEnum):
    """Who computes a layer that has not landed when it is reached."""

    DEVICE = 0  # the device, after waiting for it
    CPU = 1  # the CPU, shrink and expand
    CPU_SHRINK = 2  # the CPU shrinks and the device expands where B has landed, else as CPU


@dataclass(frozen=True)
class Plan:
    """`choices`: one a layer; `order`: the load's copies; `ttft_ms`: predicted time of the prefill's
    layers."""

    choices: tuple[Choice, ...]
    order: tuple[Step, ...]
    ttft_ms: float

    @property
    def uses_cpu(self) -> bool:
        return any(self.choices)

    def describe(self) -> str:
        """Such as "layers 0-3 CPU, 4-15 DEVICE"."""
        parts, layer = [], 0
        for choice, run in groupby(self.choices):
            stop = layer + len(list(run))
            parts.append(f"{layer}-{stop - 1} {choice.name}")
            layer = stop
        return "layers " + ", ".join(parts)


@dataclass(frozen=True)
class Comparison:
    """Predicted ms of a prefill's layers in each mode; `plan` is what `auto` does."""

    cached_ms: float
    on_demand_ms: float
    pipelined: Plan
    cpu_assisted: Plan
    cpu_shrink: Plan
    plan: Plan

    def overheads_ms(self) -> dict[str, float]:
        """What each mode takes beyond `cached`."""
        times = {
            "cached": self.cached_ms,
            "on_demand": self.on_demand_ms,
            "pipelined": self.pipelined.ttft_ms,
            "cpu_assisted": self.cpu_assisted.ttft_ms,
            "cpu_shrink": self.cpu_shrink.ttft_ms,
            "auto": self.plan.ttft_ms,
        }
        return {mode: ms - self.cached_ms for mode, ms in times.items()}


def compare(profile: CostProfile, layout: AdapterLayout, num_tokens: int) -> Comparison:
    """All modes for one cold adapter and a prefill of `num_tokens`.

    Raises ValueError for less than one token.
    """
    if num_tokens < 1:
        raise ValueError(f"a prefill of {num_tokens} tokens; it must have at least 1")
    return _compare(profile, layout, -(-num_tokens // TOKEN_STEP) * TOKEN_STEP)


def make_plan(profile: CostProfile, layout: AdapterLayout, num_tokens: int) -> Plan:
    """What `auto` does. Raises ValueError as `compare`."""
    return compare(profile, layout, num_tokens).plan


@lru_cache(maxsize=1024)
def _compare(profile: CostProfile, layout: AdapterLayout, num_tokens: int) -> Comparison:
    layers = price_layers(profile, layout, num_tokens)
    cached_ms = sum(layer.device_ms for layer in layers)
    pipelined = predict(profile, layers, [Choice.DEVICE] * len(layers), by_layer(range(len(layers))))
    cpu = shrink = best = pipelined
    if profile.num_workers:
        cpu = _fastest(_prefix_plans(profile, layers, Choice.CPU))
        shrink = _fastest(_prefix_plans(profile, layers, Choice.CPU_SHRINK))
        best = _fastest([cpu, shrink, *_mixed_plans(profile, layers)])
    return Comparison(
        cached_ms=cached_ms,
        on_demand_ms=cached_ms + sum(layer.load_ms for layer in layers),
        pipelined=pipelined,
        cpu_assisted=cpu,
        cpu_shrink=shrink,
        plan=best if best.ttft_ms < (1 - MIN_GAIN) * pipelined.ttft_ms else pipelined,
    )


def _fastest(plans: Iterable[Plan]) -> Plan:
    return min(plans, key=lambda plan: plan.ttft_ms)


# --- candidates ---


def _sizes(num_layers: int) -> list[int]:
    step = max(1, num_layers // GRID)
    return sorted({*range(0, num_layers + 1, step), num_layers})


def _prefix_plans(profile: CostProfile, layers: Sequence[LayerCosts], choice: Choice) -> Iterator[Plan]:
    """The published scheme: the CPU computes a first group of layers while the next ones travel, and after
    that any layer that has not landed. The first group's weights travel last: nobody waits for them."""
    num_layers = len(layers)
    for size in _sizes(num_layers):
        is_shrink = choice is Choice.CPU_SHRINK
        order = group_order(num_layers, 0 if is_shrink else size, size if is_shrink else 0)
        yield predict(profile, layers, [choice] * num_layers, order)
    if choice is Choice.CPU_SHRINK:
        yield predict(profile, layers, [choice] * num_layers, b_first(num_layers))


def _mixed_plans(profile: CostProfile, layers: Sequence[LayerCosts]) -> Iterator[Plan]:
    """`num_cpu` layers on the CPU, then `num_shrink` shrunk there, and the rest waits on the device."""
    num_layers = len(layers)
    sizes = _sizes(num_layers)[::2]
    for num_cpu in sizes:
        for num_shrink in sizes:
            rest = num_layers - num_cpu - num_shrink
            if rest >= 0 and rest < num_layers:
                choices = [Choice.CPU] * num_cpu + [Choice.CPU_SHRINK] * num_shrink + [Choice.DEVICE] * rest
                yield predict(profile, layers, choices, group_order(num_layers, num_cpu, num_shrink))


def group_order(num_layers: int, num_cpu: int, num_shrink: int) -> tuple[Step, ...]:
    """B of the layers that are shrunk on the CPU, all of those left to the device, then what nobody
    waits for."""
    shrunk = range(num_cpu, num_cpu + num_shrink)
    return (
        *((layer, "B") for layer in shrunk),
        *by_layer(range(num_cpu + num_shrink, num_layers)),
        *((layer, "A") for layer in shrunk),
        *by_layer(range(num_cpu)),
    )


# --- prediction ---


def predict(
    profile: CostProfile, layers: Sequence[LayerCosts], choices: Sequence[Choice], order: Sequence[Step]
) -> Plan:
    """Runs the layers one after another against the arrival of their weights; the load starts with the
    prefill.

    A layer that has landed when it is reached is computed by the device, whatever was chosen, and so is one
    that the device waits for in any case. Results that
    come back over the link delay what has yet to land.
    """
    a_at, b_at = _arrivals_ms(layers, order)
    now_ms = delay_ms = 0.0
    has_used_cpu = False
    for layer, costs, choice in zip(range(len(layers)), layers, choices, strict=True):
        landed_ms = max(a_at[layer], b_at[layer]) + delay_ms
        if choice is Choice.DEVICE or costs.is_awaited or landed_ms <= now_ms:
            now_ms = max(now_ms, landed_ms) + costs.device_ms
            continue
        now_ms += 0.0 if has_used_cpu else profile.session_ms
        has_used_cpu = True
        if choice is Choice.CPU_SHRINK and b_at[layer] + delay_ms <= now_ms:
            now_ms += costs.shrink_ms
            delay_ms += costs.shrink_return_ms
        else:
            now_ms += costs.cpu_ms
            delay_ms += costs.cpu_return_ms
    return Plan(tuple(choices), tuple(order), now_ms)


def _arrivals_ms(layers: Sequence[LayerCosts], order: Sequence[Step]) -> tuple[list[float], list[float]]:
    at: dict[str, list[float]] = {half: [0.0] * len(layers) for half in "AB"}
    now_ms = 0.0
    for layer, halves in order:
        now_ms += sum(layers[layer].load_a_ms if half == "A" else layers[layer].load_b_ms for half in halves)
        for half in halves:
            at[half][layer] = now_ms
    return at["A"], at["B"]
