"""The requests of a trace through the simulator."""

from toppings.lab.outcome import Outcome
from toppings.sim.records import SimResult
from toppings.sim.settings import NS_PER_MS, NS_PER_S, SimConfig
from toppings.sim.simulator import Simulator
from toppings.sim.trace import Trace


class SimulatorPlayer:
    def __init__(self, config: SimConfig) -> None:
        self._config = config

    def play(self, trace: Trace) -> list[Outcome]:
        """Raises AssertionError where a request was rejected."""
        return outcomes_of(Simulator(self._config, trace).run(), trace)


def outcomes_of(result: SimResult, trace: Trace) -> list[Outcome]:
    """Raises AssertionError where a request was rejected or is still there."""
    assert result.has_ended.all(), "a simulated request has not ended"
    return [
        Outcome(trace.adapter_names[adapter], sent_at, e2e_ms, ttft_ms, num_tokens, num_prompt_tokens)
        for adapter, sent_at, e2e_ms, ttft_ms, num_tokens, num_prompt_tokens in zip(
            trace.adapters.tolist(),
            (result.arrived_at / NS_PER_S).tolist(),
            ((result.ended_at - result.arrived_at) / NS_PER_MS).tolist(),
            ((result.first_token_at - result.arrived_at) / NS_PER_MS).tolist(),
            result.num_tokens.tolist(),
            trace.prompt_tokens.tolist(),
        )
    ]
