"""How a cold request's start came about: noted step by step, told with its first token."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from toppings.adapters.device_tier import LoadTimes
from toppings.assist.exchange import CpuWork
from toppings.core import BatchItem
from toppings.engine.model_runner import StepResult
from toppings.messages import ColdLayer, ColdStep, Span

MAX_COLD_STEPS = 64
"""Steps of a prompt that are told one by one."""


def ms(seconds: float) -> float:
    return seconds * 1e3


@dataclass(slots=True)
class ColdNotes:
    """Of one request; its memory is bounded by `MAX_COLD_STEPS` and the model's layers."""

    arrived_at: float  # time.perf_counter
    steps: list[ColdStep] = field(default_factory=list)
    num_steps_of_adapter: int = 0  # those in which it acted
    cpu_work: dict[int, CpuWork] = field(default_factory=dict)  # by layer

    def note(self, item: BatchItem, now: float, step_s: float, result: StepResult) -> None:
        """A step that has ended `now`, after `step_s`. `item` is as it was committed: its request's computed
        tokens have these among them."""
        span = self._span(now - step_s, now)
        step = ColdStep(span, item.num_tokens, ms(result.load_wait_s))
        if len(self.steps) < MAX_COLD_STEPS:
            self.steps.append(step)
        else:
            self.steps[-1] = _joined(self.steps[-1], step)
        if item.stop > item.request.adapter_start:
            self.num_steps_of_adapter += 1
        if result.assist is not None:
            for (adapter_id, layer), work in result.assist.cpu_work.items():
                if adapter_id == item.request.adapter_id:
                    self._add(layer, work)

    def _add(self, layer: int, work: CpuWork) -> None:
        known = self.cpu_work.setdefault(layer, CpuWork(work.started_at))
        known.ended_at = max(known.ended_at, work.ended_at)
        known.num_products += work.num_products
        known.num_slices += work.num_slices

    def layers(self, times: LoadTimes, targeted_groups: Sequence[int]) -> list[ColdLayer]:
        return [
            self._layer(times.copies[layer], num_groups * self.num_steps_of_adapter, self.cpu_work.get(layer))
            for layer, num_groups in enumerate(targeted_groups)
        ]

    def _layer(self, copy: tuple[float, float] | None, num_products: int, work: CpuWork | None) -> ColdLayer:
        landed = None if copy is None else self._span(*copy)
        if work is None:
            return ColdLayer(landed, num_products)
        cpu = self._span(work.started_at, work.ended_at)
        return ColdLayer(landed, num_products, work.num_products, work.num_slices, cpu)

    def read(self, times: LoadTimes) -> Span | None:
        return None if times.read_at is None else self._span(times.read_at, times.host_ready_at)

    @property
    def arrived_at_unix(self) -> float:
        return time.time() - (time.perf_counter() - self.arrived_at)

    def _span(self, start: float, stop: float) -> Span:
        return Span(ms(start - self.arrived_at), ms(stop - self.arrived_at))


def _joined(first: ColdStep, second: ColdStep) -> ColdStep:
    return ColdStep(
        Span(first.span.from_ms, second.span.to_ms),
        first.num_tokens + second.num_tokens,
        first.load_wait_ms + second.load_wait_ms,
    )
