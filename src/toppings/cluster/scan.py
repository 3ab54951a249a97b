"""The instance of least cost in one compiled pass over the columns: deciding costs little more than a call.

Array operations would take some thirty passes, each with a microsecond of overhead. Sums are not reordered:
the same columns give the same choice on every machine.
"""

import math

import numpy as np
from numba import boolean, float64, int64, njit, types

from toppings.cluster.instances import DECODE, PREFILL, Instances, rows_with
from toppings.cluster.perf_model import (
    CONTEXT_TOKENS,
    DISTINCT_RANK_SUM,
    GATHERED_TOKENS,
    PADDED_RANKS,
    RANK_SUM,
    SEQUENCES,
    STEPS,
    TOKENS,
)
from toppings.cluster.policies.base import PolicySettings
from toppings.cluster.snapshot import Choice, RequestSnapshot

NONE = -1
_UNKNOWN = np.zeros((2, 0), dtype=np.bool_)
_NO_LOADS = np.zeros(0)
_COLUMN, _COLUMNS, _BATCHES = float64[:], float64[:, :], float64[:, :, :]
_SIGNATURE = types.Tuple((int64, boolean, float64, float64))(
    *(boolean[:], _BATCHES, _BATCHES, _COLUMNS),  # is_open, models, batches, max_ranks
    *(_COLUMN, _COLUMN, _COLUMN, _COLUMN),  # kv_total, kv_used, max_seqs, found
    *(boolean[:, :], _COLUMN, boolean),  # is_known, load_ms, weighs_residency
    *(float64, float64, float64, float64, float64),  # rank, prompt, response, slo_tpt_ms, slo_ttft_ms
)


@njit(cache=True)
def _added_ms(models, batches, max_ranks, kind, row, rank, tokens, context, is_known):  # type: ignore[no-untyped-def]
    """What a request of `tokens` tokens adds to one batch of an instance."""
    model, batch = models[kind, :, row], batches[kind, :, row]
    max_rank = max(max_ranks[kind, row], rank)
    padded = (batch[TOKENS] + tokens) * max_rank - batch[PADDED_RANKS]
    ms = model[TOKENS] * tokens + model[SEQUENCES] + model[PADDED_RANKS] * padded
    ms += model[RANK_SUM] * tokens * rank + model[CONTEXT_TOKENS] * context
    if not is_known:
        ms += model[DISTINCT_RANK_SUM] * rank
    return ms if batch[STEPS] else ms + model[STEPS]


@njit(cache=True)
def _batch_ms(models, batches, kind, row):  # type: ignore[no-untyped-def]
    """What one batch of an instance takes as it is."""
    ms = 0.0
    for feature in range(models.shape[1]):
        ms += models[kind, feature, row] * batches[kind, feature, row]
    return ms


@njit(cache=True)
def _share_to_end(num, max_seqs, lacking, kv_total):  # type: ignore[no-untyped-def]
    """Of the responses under way, what has to end before another request has a sequence and cache."""
    share = lacking / kv_total if lacking > 0.0 else 0.0
    return share + (num + 1.0 - max_seqs) / max_seqs if num >= max_seqs else share


@njit(cache=True)
def _is_less(cost, num, least):  # type: ignore[no-untyped-def]
    """Less, or as little with fewer requests; of equals the first stays."""
    return cost < least[0] or (cost == least[0] and num < least[1])


@njit(_SIGNATURE, cache=True)
def _scan(  # type: ignore[no-untyped-def]
    is_open,
    models,
    batches,
    max_ranks,
    kv_total,
    kv_used,
    max_seqs,
    found,
    is_known,
    load_ms,
    weighs_residency,
    rank,
    prompt,
    response,
    slo_tpt_ms,
    slo_ttft_ms,
):
    """See `least_cost`: the row (or NONE), whether it keeps the SLO, TPT and TTFT predicted there."""
    nowhere = (math.inf, math.inf)
    kept, roomy, open_ = nowhere, nowhere, nowhere  # cost and requests of the best of each kind so far
    kept_row, roomy_row, open_row = NONE, NONE, NONE
    kept_tpt = roomy_tpt = open_tpt = kept_ttft = roomy_ttft = open_ttft = 0.0
    knows_loads, knows = load_ms.shape[0] > 0, is_known.shape[1] > 0
    has_ttft = slo_ttft_ms < math.inf
    weighs_prefixes = found.any()
    for row in range(is_open.shape[0]):
        if not is_open[row]:
            continue
        num = batches[DECODE, TOKENS, row]
        knows_active, knows_queued = knows and is_known[DECODE, row], knows and is_known[PREFILL, row]
        decode = _added_ms(models, batches, max_ranks, DECODE, row, rank, 1.0, prompt, knows_active)
        new = prompt - found[row]
        attended = new * (found[row] + (new + 1.0) / 2.0)
        prefill = _added_ms(models, batches, max_ranks, PREFILL, row, rank, new, attended, knows_queued)
        if new > 1.0:
            prefill += models[PREFILL, GATHERED_TOKENS, row] * found[row]
        tpt = decode + _batch_ms(models, batches, DECODE, row)
        per_token, own = prefill / response + decode, 0.0
        free = kv_total[row] - max(kv_used[row], batches[DECODE, CONTEXT_TOKENS, row])
        lacking = max(0.0, prompt + response - free)
        has_room = num < max_seqs[row]
        ttft = (
            prefill + _batch_ms(models, batches, PREFILL, row) + tpt + (load_ms[row] if knows_loads else 0.0)
        )
        ttft += _share_to_end(num, max_seqs[row], lacking, kv_total[row]) * response * tpt
        if weighs_residency:
            load = load_ms[row] / response
            per_token += load
            own = load + tpt * (lacking / kv_total[row])
        elif lacking > 0.0:
            has_room = False
        tpt += own
        cost = per_token * num + own
        if weighs_prefixes:
            cost += prefill / response
        excess = max(tpt / slo_tpt_ms, ttft / slo_ttft_ms) if has_ttft else tpt
        if has_room and tpt <= slo_tpt_ms and ttft <= slo_ttft_ms and _is_less(cost, num, kept):
            kept, kept_row, kept_tpt, kept_ttft = (cost, num), row, tpt, ttft
        if has_room and _is_less(excess, num, roomy):
            roomy, roomy_row, roomy_tpt, roomy_ttft = (excess, num), row, tpt, ttft
        if _is_less(num, num, open_):
            open_, open_row, open_tpt, open_ttft = (num, num), row, tpt, ttft
    if kept_row != NONE:
        return kept_row, True, kept_tpt, kept_ttft
    if roomy_row != NONE:
        return roomy_row, roomy_tpt <= slo_tpt_ms and roomy_ttft <= slo_ttft_ms, roomy_tpt, roomy_ttft
    return open_row, open_tpt <= slo_tpt_ms and open_ttft <= slo_ttft_ms, open_tpt, open_ttft


def least_cost(
    request: RequestSnapshot, instances: Instances, settings: PolicySettings, *, weighs_residency: bool
) -> Choice | None:
    """The choice of `rank_aware`, or with `weighs_residency` of `rank_aware_residency`: their modules say
    what they minimise. None where no instance is open.

    The time until the first token is predicted as PrePerf(queue + i), one step DecPerf(running + queue + i),
    the load of the adapter, and where no sequence is free or the cache lacks room, the wait for those: by
    Little's law, with all sequences in use one is free every response length x DecPerf / sequences. Where an
    objective for it is set and no instance with room keeps both, the one is chosen that misses the worse of
    the two by the smallest factor.
    """
    is_known, loads = _UNKNOWN, _NO_LOADS
    if instances.uses_distinct_ranks and request.adapter is not None:
        is_known = np.zeros((2, len(instances)), dtype=np.bool_)
        is_known[DECODE, rows_with(request.adapter, instances.active)] = True
        is_known[PREFILL, rows_with(request.adapter, instances.queued_adapters)] = True
    if weighs_residency or settings.slo_ttft_ms < math.inf:
        loads = instances.load_ms(request)
    row, keeps_slo, tpt, ttft = _scan(
        *instances.scanned,
        is_known,
        loads,
        weighs_residency,
        float(request.rank),
        float(request.prompt_tokens),
        float(request.response_tokens),
        settings.slo_tpt_ms,
        settings.slo_ttft_ms,
    )
    return None if row == NONE else Choice(row, instances.ids[row], not keeps_slo, tpt, ttft)
