"""The three loads that engine and simulator are given."""

from dataclasses import dataclass, replace
from typing import Any

from toppings.cluster.batch_row import BatchRow
from toppings.cluster.perf_model import PerfModel
from toppings.lab.simulation.metrics import summarize_run
from toppings.lab.validation.world import World
from toppings.sim.seeds import generator
from toppings.sim.settings import SimConfig
from toppings.sim.simulator import Simulator
from toppings.sim.synth.lengths import LogNormal
from toppings.sim.synth.workload import Workload
from toppings.sim.trace import IntArray, Trace

MEAN_PROMPT, MEAN_RESPONSE = 80, 32
PROMPTS, RESPONSES = LogNormal.of_mean(MEAN_PROMPT, 0.7, 320), LogNormal.of_mean(MEAN_RESPONSE, 0.6, 128)
"""Short, since a CPU computes them."""
NUM_SPARE = 2
AT_ONCE = 1e6


@dataclass(frozen=True, kw_only=True)
class ValidationLoad:
    """`utilization`: the rate of arrivals over the rate at which the server saturates; `pool_share`: what
    part of all adapters the device has room for; `chunk`: tokens of one step.

    `load_ratio`: what loading an adapter takes over an emulated link, as a multiple of a prefill, both of
    mean size; 0: all adapters are on the device from the start.
    """

    name: str
    arrivals: str
    popularity: str
    mode: str
    utilization: float
    chunk: int
    max_num_seqs: int = 16
    pool_share: float = 1.0
    load_ratio: float = 0.0

    @property
    def is_cold(self) -> bool:
        return bool(self.load_ratio)

    def settings(self, world: World, rough: PerfModel) -> dict[str, Any]:
        """The engine's, beside the world's."""
        settings: dict[str, Any] = {
            "mode": self.mode,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.chunk,
        }
        if not self.is_cold:
            return settings
        rows = [BatchRow(int(world.ranks.mean()), num_tokens=MEAN_PROMPT)]
        load_ms = self.load_ratio * rough.prefill.predict_batch(rows)
        link_gbps = world.adapter_bytes / len(world.ranks) / load_ms / 1e6
        pool_bytes = max(self.pool_share * world.adapter_bytes, world.bytes_per_rank * int(world.ranks.max()))
        return {**settings, "link_gbps": float(f"{link_gbps:.2g}"), "device_pool_bytes": int(pool_bytes)}

    def make_trace(self, num_requests: int, rate: float, ranks: IntArray, seed: int) -> Trace:
        """Exactly so many requests at exactly this mean rate; the same trace for the same arguments."""
        duration_s, drawn = NUM_SPARE * num_requests / rate, None
        while drawn is None or len(drawn) < num_requests:
            workload = Workload(
                arrivals=self.arrivals,
                popularity=self.popularity,
                rate=rate,
                duration_s=duration_s,
                num_adapters=len(ranks),
            )
            drawn = workload.make_trace(seed)
            duration_s *= 2
        rng, first = generator(seed, "validation lengths"), slice(num_requests)
        trace = replace(
            drawn,
            arrivals_s=drawn.arrivals_s[first],
            adapters=drawn.adapters[first],
            prompt_tokens=PROMPTS.draw(num_requests, rng),
            response_tokens=RESPONSES.draw(num_requests, rng),
            ranks=ranks,
            duration_s=float(drawn.arrivals_s[num_requests - 1]),
        )
        return trace.scaled_to(rate)

    def saturation_rate(self, num_requests: int, config: SimConfig, ranks: IntArray, seed: int) -> float:
        """Requests a second that the simulated server ends when they are all there at once."""
        trace = self.make_trace(num_requests, AT_ONCE, ranks, seed)
        return summarize_run(Simulator(config, trace).run()).requests_per_s


LOADS = (
    ValidationLoad(
        name="steady, warm adapters",
        arrivals="poisson",
        popularity="published",
        mode="cached",
        utilization=0.5,
        chunk=512,
    ),
    ValidationLoad(
        name="bursts, prefill in chunks",
        arrivals="gamma:3",
        popularity="published",
        mode="cached",
        utilization=0.85,
        chunk=96,
    ),
    ValidationLoad(
        name="cold adapters",
        arrivals="poisson",
        popularity="uniform",
        mode="pipelined",
        utilization=0.6,
        chunk=512,
        pool_share=0.25,
        load_ratio=1.0,
    ),
)
