"""A simulation in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toppings.lab.summary import Latencies, Stats
from toppings.sim.records import SimResult
from toppings.sim.settings import NS_PER_MS, NS_PER_S


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Of one run. `slo_attainment`: share of those that ended or were rejected whose TPT is within
    the SLO.

    Rates are per second, from the first arrival to the last token. `rank_mix` [instances][ranks]: how many
    requests of each of `ranks` a server got.
    """

    policy: str
    seed: int
    num_arrived: int
    num_ended: int
    num_rejected: int
    num_present: int
    num_breaking: int
    slo_tpt_ms: float
    slo_attainment: float
    ttft_ms: Stats
    tpt_ms: Stats
    e2e_ms: Stats
    requests_per_s: float
    tokens_per_s: float
    busy_share: float
    num_preemptions: int
    adapter_hit_rate: float
    exposed_share: float
    ranks: Sequence[int]
    rank_mix: Sequence[Sequence[int]]
    cached_share: float | None = None  # of prompt tokens, where prompts tell what they share


def latencies_of(result: SimResult) -> Latencies:
    """Of the requests that ended."""
    ended = result.has_ended
    e2e = (result.ended_at - result.arrived_at)[ended] / NS_PER_MS
    ttft = (result.first_token_at - result.arrived_at)[ended] / NS_PER_MS
    return Latencies(ttft, e2e / result.num_tokens[ended], e2e)


def summarize_run(result: SimResult) -> RunSummary:
    config, ended, totals = result.config, result.has_ended, result.instances
    num_ended, num_rejected = int(ended.sum()), int(result.is_rejected.sum())
    latencies = latencies_of(result)
    stats = latencies.stats()
    first = int(result.arrived_at[0]) if len(result.arrived_at) else 0
    span_s = max(1, int(result.ended_at.max(initial=first)) - first) / NS_PER_S
    busy_s = sum(t.busy_s for t in totals)
    num_hits, num_loads = sum(t.num_adapter_hits for t in totals), sum(t.num_adapter_loads for t in totals)
    num_cached, num_queried = (
        sum(t.num_cached_tokens for t in totals),
        sum(t.num_queried_tokens for t in totals),
    )
    ranks, kinds = np.unique(result.ranks, return_inverse=True)
    mix = np.zeros((config.num_instances, len(ranks)), dtype=np.int64)
    is_sent = result.rows >= 0
    np.add.at(mix, (result.rows[is_sent], kinds[is_sent]), 1)
    return RunSummary(
        policy=config.policy,
        seed=config.seed,
        num_arrived=len(result.arrived_at),
        num_ended=num_ended,
        num_rejected=num_rejected,
        num_present=result.num_present,
        num_breaking=result.num_breaking,
        slo_tpt_ms=config.slo_tpt_ms,
        slo_attainment=_share(int((latencies.tpt <= config.slo_tpt_ms).sum()), num_ended + num_rejected),
        ttft_ms=stats["ttft"],
        tpt_ms=stats["tpt"],
        e2e_ms=stats["e2e"],
        requests_per_s=num_ended / span_s,
        tokens_per_s=float(result.num_tokens[ended].sum() / span_s),
        busy_share=busy_s / (max(result.wall_s, 1e-9) * len(totals)),
        num_preemptions=sum(t.num_preemptions for t in totals),
        adapter_hit_rate=_share(num_hits, num_hits + num_loads),
        exposed_share=sum(t.exposed_s for t in totals) / max(busy_s, 1e-9),
        ranks=ranks.tolist(),
        rank_mix=mix.tolist(),
        cached_share=_share(num_cached, num_queried) if num_queried else None,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
