"""Policies of cold prefills that may use the CPU: they answer with a `Plan`, the coordinator follows it."""

from abc import ABC, abstractmethod

from toppings.adapters.layout import AdapterLayout, LoadOrder
from toppings.adapters.modes import PipelinedMode
from toppings.assist.cost import CostProfile
from toppings.assist.plan import Comparison, Plan, compare


class AssistMode(PipelinedMode, ABC):
    """A `LoadingMode` that knows what a cold start costs here; `calibrate` it before the first load, or else
    it acts as `pipelined`.

    Plans are cached: asking on the engine's loop costs milliseconds once, then nothing.
    """

    def __init__(self) -> None:
        self._profile: CostProfile | None = None

    def calibrate(self, profile: CostProfile) -> None:
        self._profile = profile

    def plan(self, layout: AdapterLayout, num_tokens: int) -> Plan:
        """Each layer's choice, and the order in which the weights travel, for a prefill of `num_tokens`."""
        assert self._profile is not None, "the mode was not calibrated"
        return self.choose(compare(self._profile, layout, num_tokens))

    @abstractmethod
    def choose(self, comparison: Comparison) -> Plan:
        """One of the plans that were compared."""

    def load_order(self, layout: AdapterLayout, num_tokens: int) -> LoadOrder:
        if self._profile is None:
            return super().load_order(layout, num_tokens)
        return self.plan(layout, num_tokens).order

    def load_tokens(self, layout: AdapterLayout) -> float | None:
        if self._profile is None:
            return super().load_tokens(layout)
        return self._profile.load_tokens(layout.num_bytes, layout.num_layers)


class CpuAssistedMode(AssistMode):
    """Published behaviour: whatever has not landed when it is reached is computed on the CPU."""

    name = "cpu_assisted"

    def choose(self, comparison: Comparison) -> Plan:
        return comparison.cpu_assisted


class CpuShrinkMode(AssistMode):
    """As `cpu_assisted`, but B travels first and, where it has landed, the CPU only shrinks."""

    name = "cpu_shrink"

    def choose(self, comparison: Comparison) -> Plan:
        return comparison.cpu_shrink


class AutoMode(AssistMode):
    """Per adapter and prefill length, whatever the profile says is fastest; often no CPU at all."""

    name = "auto"

    def choose(self, comparison: Comparison) -> Plan:
        return comparison.plan


ASSIST_MODES: dict[str, type[AssistMode]] = {
    mode.name: mode for mode in (CpuAssistedMode, CpuShrinkMode, AutoMode)
}
