"""What is simulated: the servers, their limits, and how the router in front of them decides."""

import math
from dataclasses import dataclass

from toppings.cluster.batch_row import BatchRow
from toppings.cluster.perf_model import PerfModel
from toppings.cluster.placement import NO_PLACEMENT, PLACEMENTS
from toppings.cluster.policies import POLICIES
from toppings.config import (
    EVICTION_POLICIES,
    SCHEDULING_POLICIES,
    SWITCH,
    ConfigError,
    EngineConfig,
    Settings,
    setting,
)
from toppings.sim.loading import MODES

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000

LLAMA_7B_QKV_BYTES_PER_RANK = 2 * 32 * 24_576
"""bf16, 32 layers, inputs and outputs of q, k and v together 24,576: 101 MB at rank 64."""


@dataclass(frozen=True, kw_only=True)
class SimConfig(Settings):
    """Equal servers behind one router, or several. Sizes in bytes or tokens, times in seconds unless named.

    `bytes_per_rank`: size of an adapter of rank 1, `num_layers` equal layers together. `eviction`: which
    adapter leaves the device first. `load_latency_ms`: what a load takes beside the time of its bytes.
    `cpu_gflops`: 10^9 FLOP/s (0: no workers; `auto` is then `pipelined`), `round_trip_ms` what one layer's
    visit there costs. Between two copies of its accounts a router forgets what it sent itself. `slo_tpt_ms`:
    objective (inf: none). `is_stepwise` runs every decode step on its own: the same result, slower.

    Raises ConfigError for a value out of its range.
    """

    perf_model: PerfModel
    policy: str = setting("rank_aware", choices=tuple(POLICIES))
    placement: str = setting(NO_PLACEMENT, "which servers hold which adapter", choices=tuple(PLACEMENTS))
    num_copies: int = setting(2, "homes of an adapter (static_k, shuffle_shard)", at_least=1)
    placement_interval_s: float = setting(2.0, "s between two plans", above=0)
    num_instances: int = setting(1, "servers behind the router", at_least=1)
    mode: str = setting("pipelined", "cold adapters", choices=tuple(MODES))
    slo_tpt_ms: float = setting(math.inf, above=0)
    slo_ttft_ms: float = setting(math.inf, "objective for the time until the first token, ms", above=0)
    batch_tenants: str = setting(
        "", "tenants of the trace whose requests take what others leave (commas between)"
    )
    seed: int = setting(0, at_least=0)
    max_num_seqs: int = setting(256, "requests at once on a server", at_least=1)
    max_num_batched_tokens: int = setting(
        EngineConfig.max_num_batched_tokens, "tokens of one step", at_least=1
    )
    max_model_len: int = setting(32768, at_least=1)
    page_size: int = setting(EngineConfig.page_size, at_least=1)
    enable_prefix_caching: str = setting(
        EngineConfig.enable_prefix_caching, "for traces that tell what prompts share", choices=SWITCH
    )
    prefix_routing: str = setting(
        "on", "the router knows which prompts' beginnings it sent where", choices=SWITCH
    )
    kv_cache_tokens: int = setting(65536, "of a server", at_least=1)
    max_adapter_wait_s: float = setting(EngineConfig.max_adapter_wait_s, at_least=0)
    scheduling_policy: str = setting(
        EngineConfig.scheduling_policy, "who is next on a server", choices=SCHEDULING_POLICIES
    )
    device_pool_bytes: int = setting(8 * 2**30, "of a server", at_least=1)
    host_store_bytes: int = setting(0, "of a server (0: holds every adapter)", at_least=0)
    eviction: str = setting(EngineConfig.eviction, choices=EVICTION_POLICIES)
    load_latency_ms: float = setting(0.0, at_least=0)
    bytes_per_rank: int = setting(LLAMA_7B_QKV_BYTES_PER_RANK, "of an adapter", at_least=1)
    num_layers: int = setting(32, "of the base model", at_least=1)
    cpu_gflops: float = setting(0.0, "of a server's CPU workers together", at_least=0)
    round_trip_ms: float = setting(0.05, at_least=0)
    response_tokens: float = setting(128.0, at_least=1)
    report_interval_s: float = setting(1.0, "s between a server's reports to the router", above=0)
    candidates: int = setting(0, "servers drawn for each request to choose from (0: all)", at_least=0)
    num_routers: int = setting(1, "that take requests in turn and share no state", at_least=1)
    snapshot_interval_s: float = setting(
        0.0, "s between copies of its accounts that a router decides on (0: no copies)", at_least=0
    )
    migration_interval_s: float = setting(0.1, above=0)
    kill_at_s: float = setting(
        0.0, "s after which the last server dies (0: never), while requests arrive", at_least=0
    )
    is_stepwise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; "
                f"it must be at least max_num_seqs, {self.max_num_seqs}"
            )
        if self.mode == "cpu_assisted" and not self.cpu_gflops:
            raise ConfigError("mode is 'cpu_assisted' and cpu_gflops is 0; say what the CPU computes")
        if self.kill_at_s and self.num_instances < 2:
            raise ConfigError(f"kill_at_s is {self.kill_at_s:g} and num_instances 1; nobody would be left")
        if self.num_pages * self.page_size < self.max_model_len:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}; kv_cache_tokens {self.kv_cache_tokens} hold less"
            )

    @property
    def num_pages(self) -> int:
        return self.kv_cache_tokens // self.page_size

    def adapter_bytes(self, rank: int) -> int:
        return rank * self.bytes_per_rank


def base_tpt_ms(model: PerfModel) -> float:
    """A decode step of one request without an adapter: what an SLO such as 1.5x is a multiple of."""
    ms = model.decode.predict_batch([BatchRow(rank=0)])
    if not ms > 0:
        raise ValueError(f"the decode model predicts {ms} ms for one request; it must be above 0")
    return ms


def parse_slo_ms(text: str, model: PerfModel) -> float:
    """`50` (ms per token), `1.5x` (times the base model's) or `none`. Raises ValueError."""
    if text == "none":
        return math.inf
    try:
        value = float(text.removesuffix("x"))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"slo is {text!r}; write ms per token, a multiple such as 1.5x, or none")
    return value * base_tpt_ms(model) if text.endswith("x") else value
