"""A simulation in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toppings.lab.summary import Latencies, Stats
from toppings.sim.records import SimResult
from toppings.sim.settings import NS_PER_MS, NS_PER_S, SimConfig


@dataclass(frozen=True, slots=True)
class TenantSummary:
    """`token_share`: of all tokens that came before the last request arrived, while the tenants compete,
    those of its requests that had begun by then, a prompt with its first token, the rest evenly until its
    end. `slo_attainment`: as of `RunSummary`, among its requests."""

    name: str
    weight: float
    num_arrived: int
    num_ended: int
    ttft_ms: Stats
    tpt_ms: Stats
    token_share: float
    slo_attainment: float


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Of one run. `slo_attainment`: share of those that ended or were rejected that were within the
    objectives for TTFT and TPT.

    Rates are per second, from the first arrival to the last token. `rank_mix` [instances][ranks]: how many
    requests of each of `ranks` a server got. `tenants`: of traces that have some.
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
    tenants: Sequence[TenantSummary] = ()


def latencies_of(result: SimResult, of: NDArray[np.bool_] | None = None) -> Latencies:
    """Of the requests that ended, among those that `of` [N] has, or all."""
    ended = result.has_ended if of is None else result.has_ended & of
    e2e = (result.ended_at - result.arrived_at)[ended] / NS_PER_MS
    ttft = (result.first_token_at - result.arrived_at)[ended] / NS_PER_MS
    return Latencies(ttft, e2e / result.num_tokens[ended], e2e)


def attainment_of(result: SimResult, slo_ttft_ms: float, slo_tpt_ms: float) -> float:
    """Share of all requests that ended within both objectives; NaN where there are none."""
    latencies = latencies_of(result)
    is_good = (latencies.ttft <= slo_ttft_ms) & (latencies.tpt <= slo_tpt_ms)
    return _share(int(is_good.sum()), len(result.arrived_at))


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
        slo_attainment=_share(_num_within(config, latencies), num_ended + num_rejected),
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
        tenants=_tenants(result),
    )


def _num_within(config: SimConfig, latencies: Latencies) -> int:
    """Of the requests that ended, those within the objectives."""
    return int(((latencies.tpt <= config.slo_tpt_ms) & (latencies.ttft <= config.slo_ttft_ms)).sum())


def _tenants(result: SimResult) -> list[TenantSummary]:
    tenants, tokens = result.tenants, tokens_by(result, result.arrived_at.max(initial=0))
    if tenants is None:
        return []
    summaries = []
    for index, (name, weight) in enumerate(zip(tenants.names, tenants.weights)):
        is_its = tenants.indices == index
        latencies = latencies_of(result, is_its)
        stats = latencies.stats()
        summaries.append(
            TenantSummary(
                name=name,
                weight=weight,
                num_arrived=int(is_its.sum()),
                num_ended=int((result.has_ended & is_its).sum()),
                ttft_ms=stats["ttft"],
                tpt_ms=stats["tpt"],
                token_share=_share(float(tokens[is_its].sum()), float(tokens.sum())),
                slo_attainment=_share(
                    _num_within(result.config, latencies),
                    len(latencies.e2e) + int((result.is_rejected & is_its).sum()),
                ),
            )
        )
    return summaries


def tokens_by(result: SimResult, at: int) -> NDArray[np.float64]:
    """Tokens of each request [N] that came by an instant in ns, float64: its prompt's with its first one, the
    others evenly between that and its end."""
    first, last = result.first_token_at, result.ended_at
    has_begun = (first >= 0) & (first <= at)
    span = np.where(last > first, last - first, 1)
    share = np.where(last >= 0, np.clip((at - first) / span, 0.0, 1.0), 0.0)
    drawn = 1 + (result.num_tokens - 1) * share
    return np.where(has_begun, result.num_prompt_tokens + drawn, 0.0)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
