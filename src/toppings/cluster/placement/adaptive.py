"""Homes by demand: each adapter on as few servers as its load needs, where it costs all requests least.

An adapter's load is how many of its requests run at once: its rate times what a request takes. It has a
home for every `COPY_LOAD` of a server's fair share, and two at least: a hot adapter has copies before it has
a queue. Copies are then put one by one where `packing.py` says they cost least, which keeps low ranks apart
from high ones where a step pays for the largest, and adapters that are in use together within each device.
An adapter without a home is left to the routing policy, and what that chose is its first home. What stays
costs no load, and only gains that are worth one move it.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from toppings.cluster.instances import DECODE, PREFILL, Instances
from toppings.cluster.perf_model import STEPS, TOKENS, FloatArray
from toppings.cluster.placement.base import Placement, open_ids
from toppings.cluster.placement.demand import Demand
from toppings.cluster.placement.plan import Anywhere, Plan

COPY_LOAD = 0.25
"""Of a server's fair share of all load: what one copy of an adapter carries at most."""
KEPT_COPY_LOAD = 0.15
"""A copy goes only when those that stay would carry less than this."""
HORIZON_S = 60.0
"""For which a move must pay."""
LEAST_GAIN = 0.5
"""Share of what a copy costs where it is, below which demand's own noise would move it to and fro."""
SLO_SHARE = 0.85
"""Of the objective, that a decode step may take: prefills and waits take the rest."""
MAX_CLASSES = 16
"""Ranks told apart; more are rounded up."""
LEAST_COPIES = 2
"""Of any adapter: with two to choose from, servers can even out what nobody foresees."""
NUM_PASSES = 2


class Adaptive(Placement):
    def plan(self, demand: Demand, instances: Instances, previous: Plan | None) -> Plan:
        ids = open_ids(instances)
        if not ids or not len(demand):
            return Plan(ids, Anywhere())
        chosen = {} if previous is None else previous.chosen
        return Plan(ids, Anywhere(), _solve(demand, instances, ids, chosen, self.settings.slo_tpt_ms))


def _solve(
    demand: Demand,
    instances: Instances,
    ids: tuple[str, ...],
    chosen: Mapping[str, tuple[str, ...]],
    slo_tpt_ms: float,
) -> dict[str, tuple[str, ...]]:
    from toppings.cluster.placement.packing import NUM_SUMS, improve  # numba: only where it is used

    rows = np.flatnonzero(instances.is_open)
    loads = _loads(demand, instances, rows)
    order = np.argsort(-loads, kind="stable")
    row_of = {instance_id: row for row, instance_id in enumerate(ids)}
    used_at = _used_at(instances, rows)
    names = [demand.names[a] for a in order.tolist()]
    old = [
        [row_of[home] for home in chosen.get(name, ()) if home in row_of] or used_at.get(name, [])
        for name in names
    ]
    loads = loads[order]
    copies = _copies(loads, np.array([len(each) for each in old]), len(ids))
    loads = loads / copies
    indptr = np.concatenate([[0], np.cumsum(copies)])
    homes = np.full(int(indptr[-1]), -1)
    for at, num, mine in zip(indptr.tolist(), copies.tolist(), old, strict=False):
        homes[at : at + min(num, len(mine))] = mine[:num]
    ranks = _classes(demand.ranks)
    classes = np.searchsorted(ranks, demand.ranks[order])
    contexts = (demand.prompt_tokens + demand.response_tokens / 2)[order]
    shares = _shares(demand, instances, rows)[order]
    models = np.ascontiguousarray(instances.models[DECODE][:, rows])
    sums, class_loads = np.zeros((len(ids), NUM_SUMS)), np.zeros((len(ids), len(ranks)))
    _sum_up(sums, class_loads, indptr, homes, loads, contexts, classes, shares, ranks)
    load_ms = demand.num_bytes[order] * float(instances.link_ms_per_byte[rows].mean())
    for _ in range(NUM_PASSES):
        columns = (loads, contexts, classes, load_ms, shares, ranks, models, sums, class_loads)
        if not improve(indptr, homes, *columns, SLO_SHARE * slo_tpt_ms, HORIZON_S * 1e3, LEAST_GAIN):
            break
    bounds = indptr.tolist()
    return {
        name: tuple(ids[row] for row in homes[first:last].tolist())
        for name, first, last in zip(names, bounds, bounds[1:], strict=False)
    }


def _used_at(instances: Instances, rows: NDArray[np.int64]) -> dict[str, list[int]]:
    """By adapter, which of these servers have requests for it."""
    used_at: dict[str, list[int]] = {}
    for at, row in enumerate(rows.tolist()):
        for adapter in instances.active[row]:
            used_at.setdefault(adapter, []).append(at)
    return used_at


def _loads(demand: Demand, instances: Instances, rows: NDArray[np.int64]) -> FloatArray:
    """Requests of each adapter that run at once [A] (Little's law): a request takes its prefill, and for each
    token a step as they are now.
    """
    decode, prefill = instances.models[DECODE][:, rows], instances.models[PREFILL][:, rows]
    step_ms = np.maximum(instances.step_ms()[DECODE][rows], decode[STEPS]).mean()
    prefill_ms = prefill[STEPS].mean() + prefill[TOKENS].mean() * demand.prompt_tokens
    loads: FloatArray = demand.rates * (prefill_ms + demand.response_tokens * step_ms) / 1e3
    return loads


def _copies(loads: FloatArray, num_old: NDArray[np.int64], num_servers: int) -> NDArray[np.int64]:
    """How many of each adapter [A]: as many as now unless that is too few or clearly too many."""
    fair = max(float(loads.sum()) / num_servers, 1.0)
    needed = np.ceil(loads / (COPY_LOAD * fair))
    kept = np.ceil(loads / (KEPT_COPY_LOAD * fair))
    copies: NDArray[np.int64] = np.clip(
        np.clip(num_old, needed, kept), min(LEAST_COPIES, num_servers), num_servers
    ).astype(np.int64)
    return copies


def _classes(ranks: FloatArray) -> FloatArray:
    """Ranks that are told apart, ascending [K]."""
    distinct = np.unique(ranks)
    if len(distinct) <= MAX_CLASSES:
        return distinct
    picked: FloatArray = distinct[np.linspace(0, len(distinct) - 1, MAX_CLASSES).round().astype(np.int64)]
    return picked


def _shares(demand: Demand, instances: Instances, rows: NDArray[np.int64]) -> FloatArray:
    """What part of each device an adapter takes [A, N]; 0 where its room is not known."""
    of_bytes = demand.num_bytes[:, None] / instances.adapter_bytes_total[rows]
    of_slots = 1.0 / np.where(np.isinf(instances.adapter_bytes_total), instances.max_adapters, np.inf)[rows]
    shares: FloatArray = of_bytes + of_slots
    return shares


def _sum_up(sums, class_loads, indptr, homes, loads, contexts, classes, shares, ranks) -> None:  # type: ignore[no-untyped-def]
    from toppings.cluster.placement.packing import CONTEXT, DISTINCT, LOAD, MEAN, RANKS, VARIANCE

    unit_of = np.repeat(np.arange(len(loads)), np.diff(indptr))
    placed = homes >= 0
    units, at = unit_of[placed], homes[placed]
    load, rank = loads[units], ranks[classes[units]]
    in_use, share = 1.0 - np.exp(-load), shares[units, at]
    for column, values in (
        (LOAD, load),
        (RANKS, load * rank),
        (DISTINCT, in_use * rank),
        (CONTEXT, load * contexts[units]),
        (MEAN, in_use * share),
        (VARIANCE, in_use * (1.0 - in_use) * share * share),
    ):
        sums[:, column] = np.bincount(at, weights=values, minlength=len(sums))
    np.add.at(class_loads, (at, classes[units]), load)
