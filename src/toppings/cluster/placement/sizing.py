"""How many servers the demand needs: the model of `adaptive`, asked for a number."""

import math

import numpy as np
from numpy.typing import NDArray

from toppings.cluster.instances import DECODE, PREFILL, Instances
from toppings.cluster.perf_model import (
    CONTEXT_TOKENS,
    DISTINCT_RANK_SUM,
    PADDED_RANKS,
    RANK_SUM,
    SEQUENCES,
    STEPS,
    TOKENS,
    FloatArray,
)
from toppings.cluster.placement.demand import Demand

SLO_SHARE = 0.95
"""Of the objective, that a decode step may take in a bad moment: prefills and waits take the rest."""
SPREADS = 1.0
"""Deviations that a server's requests, and the adapters in use, are planned to be above their mean."""
FULL_SHARE = 0.9
"""Of devices, caches and sequences that may be in use."""


def desired_instances(demand: Demand, instances: Instances, slo_tpt_ms: float) -> int:
    """Servers like the open ones that keep the demand within the objective; 1 at least, and where there is
    nothing to go by. A safe number: in simulations, none to half as many again as the fewest that do.

    Each limit asks for a number, and the largest counts. Of requests, by Little's law, a server has as many
    as its cache and its sequences hold, and n with

        step(n + SPREADS x sqrt(n)) <= SLO_SHARE x objective

    whose ranks are the demand's mean, or its largest where a step pays for that. Of adapters, each in use
    with 1 - exp(-load), all devices together hold the mean and SPREADS deviations.
    """
    rows = np.flatnonzero(instances.is_open)
    if not len(rows) or not len(demand):
        return 1
    decode, prefill = (instances.models[kind][:, rows].mean(axis=1) for kind in (DECODE, PREFILL))
    step_ms = SLO_SHARE * slo_tpt_ms
    if math.isinf(slo_tpt_ms):
        step_ms = float(np.maximum(instances.step_ms()[DECODE][rows], decode[STEPS]).mean())
    prefill_ms = prefill[STEPS] + prefill[TOKENS] * demand.prompt_tokens
    loads = demand.rates * (prefill_ms + demand.response_tokens * step_ms) / 1e3
    wanted = [
        float(loads.sum()) / _requests_of_one(demand, loads, instances, rows, decode, slo_tpt_ms),
        _devices(demand, loads, instances, rows),
    ]
    return max(1, math.ceil(max(wanted) - 1e-9))


def _requests_of_one(
    demand: Demand,
    loads: FloatArray,
    instances: Instances,
    rows: NDArray[np.int64],
    decode: FloatArray,
    slo_tpt_ms: float,
) -> float:
    """How many a server has at once."""
    weights = loads / loads.sum()
    rank, tokens = float(weights @ demand.ranks), demand.prompt_tokens + demand.response_tokens
    each_ms = decode[TOKENS] + decode[SEQUENCES] + (decode[RANK_SUM] + decode[DISTINCT_RANK_SUM]) * rank
    each_ms += decode[PADDED_RANKS] * float(demand.ranks.max())
    each_ms += decode[CONTEXT_TOKENS] * float(weights @ (demand.prompt_tokens + demand.response_tokens / 2))
    limits = [
        FULL_SHARE * float(instances.max_num_seqs[rows].mean()),
        FULL_SHARE * float(instances.kv_tokens_total[rows].mean()) / float(weights @ tokens),
    ]
    if each_ms > 0:
        worst = max(0.0, (SLO_SHARE * slo_tpt_ms - float(decode[STEPS])) / each_ms)
        limits.append(((math.sqrt(SPREADS**2 + 4 * worst) - SPREADS) / 2) ** 2)
    return max(1.0, min(limits))


def _devices(demand: Demand, loads: FloatArray, instances: Instances, rows: NDArray[np.int64]) -> float:
    """How many hold the adapters that are in use at once; 0 where room is not known."""
    in_use, room = 1.0 - np.exp(-loads), float(instances.adapter_bytes_total[rows].mean())
    sizes = demand.num_bytes
    if math.isinf(room):
        room, sizes = float(instances.max_adapters[rows].mean()), (demand.ranks > 0).astype(np.float64)
    spread = math.sqrt(float((in_use * (1.0 - in_use)) @ sizes**2))
    return (float(in_use @ sizes) + SPREADS * spread) / (FULL_SHARE * room)
