"""The compiled part of `adaptive`: units of load are put where they cost all requests least.

A unit is one copy of an adapter: `load` requests of one rank that run at once on average, and its adapter's
share of a device. What a server then costs, with n requests, S their ranks' sum, and D distinct adapters':

    step  = steps + tokens n + padded n E[max rank] + rank_sum S + distinct_rank_sum D + context_tokens C
    space = mean + SPREADS x deviation of the shares in use, an adapter being in use with 1 - exp(-load)
    cost  = n x step x (1 + space ^ CROWDING + (worst / objective) ^ SLOWNESS)

`worst` is the step of a bad moment: SPREADS x sqrt(n) requests more, and one of the largest rank that there
is among them, come by chance or from servers that have no room. E[max rank] follows from the load of each
class of ranks, requests coming and going independently: the largest is below r with exp(-load of classes
from r on).
"""

import numpy as np
from numba import float64, int64, njit

from toppings.cluster.perf_model import (
    CONTEXT_TOKENS,
    DISTINCT_RANK_SUM,
    PADDED_RANKS,
    RANK_SUM,
    SEQUENCES,
    STEPS,
    TOKENS,
)

SPREADS = 1.5
"""Deviations by which the space in use may be above its mean."""
CROWDING = 6
"""The power that a device's crowding costs with: next to nothing while half is in use, twice when all is."""
SLOWNESS = 12
"""The power that a step costs with as it nears the objective."""
LOAD, RANKS, DISTINCT, CONTEXT, MEAN, VARIANCE, NUM_SUMS = range(7)
"""What is summed up per server."""

_SIGNATURE = int64(
    *(int64[:], int64[:]),  # indptr [A + 1], homes [U]
    *(float64[:], float64[:], int64[:], float64[:]),  # loads, contexts, classes, load_ms [A]
    *(float64[:, :], float64[:], float64[:, :]),  # shares [A, N], ranks [K], models [F, N]
    *(float64[:, :], float64[:, :]),  # sums [N, 6], class_loads [N, K]
    *(float64, float64, float64),  # slo_ms, horizon_ms, least_gain
)


@njit(cache=True)
def _cost(sums, class_loads, ranks, model, add_load, add_class, add_context, add_share, slo_ms):  # type: ignore[no-untyped-def]
    """Of one server with a unit more (of load 0: as it is)."""
    rank = ranks[add_class] if add_load else 0.0
    in_use = 1.0 - np.exp(-add_load)
    load = sums[LOAD] + add_load
    if load <= 1e-9:
        return 0.0
    max_rank, above, is_below = 0.0, 0.0, 1.0
    if model[PADDED_RANKS]:
        for which in range(len(ranks) - 1, -1, -1):
            above += class_loads[which] + (add_load if which == add_class else 0.0)
            was_below, is_below = is_below, np.exp(-above)
            max_rank += ranks[which] * (was_below - is_below)
    fixed = model[STEPS] + model[DISTINCT_RANK_SUM] * (sums[DISTINCT] + in_use * rank)
    each = model[TOKENS] + model[SEQUENCES] + model[RANK_SUM] * (sums[RANKS] + add_load * rank) / load
    each += model[CONTEXT_TOKENS] * (sums[CONTEXT] + add_load * add_context) / load
    step = fixed + (each + model[PADDED_RANKS] * max_rank) * load
    worst = fixed + (each + model[PADDED_RANKS] * ranks[-1]) * (load + SPREADS * np.sqrt(load))
    mean = sums[MEAN] + in_use * add_share
    variance = sums[VARIANCE] + in_use * (1.0 - in_use) * add_share * add_share
    space = mean + SPREADS * np.sqrt(max(variance, 0.0))
    return load * step * (1.0 + space**CROWDING + (worst / slo_ms) ** SLOWNESS)


@njit(cache=True)
def _book(sums, class_loads, ranks, sign, load, unit_class, context, share):  # type: ignore[no-untyped-def]
    """The server has the unit from now on, or with `sign` -1 no longer."""
    in_use = 1.0 - np.exp(-load)
    sums[LOAD] += sign * load
    sums[RANKS] += sign * load * ranks[unit_class]
    sums[DISTINCT] += sign * in_use * ranks[unit_class]
    sums[CONTEXT] += sign * load * context
    sums[MEAN] += sign * in_use * share
    sums[VARIANCE] += sign * in_use * (1.0 - in_use) * share * share
    class_loads[unit_class] += sign * load


@njit(cache=True)
def _is_in(row, homes):  # type: ignore[no-untyped-def]
    return (homes == row).any()


@njit(_SIGNATURE, cache=True)
def improve(  # type: ignore[no-untyped-def]
    indptr,
    homes,
    loads,
    contexts,
    classes,
    load_ms,
    shares,
    ranks,
    models,
    sums,
    class_loads,
    slo_ms,
    horizon_ms,
    least_gain,
):
    """One pass over all units, `homes[indptr[a]:indptr[a + 1]]` those of adapter a (-1: none yet), in place:
    each goes where it costs least, no two of an adapter to one server. Returns how many moved.

    A unit leaves a home only for a gain, over `horizon_ms` of steps, above what its load there holds up (all
    requests of that server for `load_ms`), and above `least_gain` of what it costs where it is.
    """
    num_moved, costs = 0, np.empty(len(sums))
    for row in range(len(sums)):
        costs[row] = _cost(sums[row], class_loads[row], ranks, models[:, row], 0.0, 0, 0.0, 0.0, slo_ms)
    for adapter in range(len(loads)):
        load, context, unit_class = loads[adapter], contexts[adapter], classes[adapter]
        for at in range(indptr[adapter], indptr[adapter + 1]):
            old, added_there = homes[at], 0.0
            if old >= 0:
                share = shares[adapter, old]
                _book(sums[old], class_loads[old], ranks, -1.0, load, unit_class, context, share)
                costs[old] = _cost(
                    sums[old], class_loads[old], ranks, models[:, old], 0.0, 0, 0.0, 0.0, slo_ms
                )
            best, least = -1, np.inf
            for row in range(len(sums)):
                if row != old and _is_in(row, homes[indptr[adapter] : indptr[adapter + 1]]):
                    continue
                model, share = models[:, row], shares[adapter, row]
                cost = _cost(
                    sums[row], class_loads[row], ranks, model, load, unit_class, context, share, slo_ms
                )
                added = cost - costs[row]
                if row == old:
                    added_there = added
                else:
                    step = costs[row] / max(sums[row, LOAD], 1e-9)
                    added += load_ms[adapter] * sums[row, LOAD] * max(step, model[STEPS]) / horizon_ms
                if added < least:
                    best, least = row, added
            if old >= 0 and best != old and least > (1.0 - least_gain) * added_there:
                best = old
            homes[at] = best
            if best >= 0:
                share = shares[adapter, best]
                _book(sums[best], class_loads[best], ranks, 1.0, load, unit_class, context, share)
                costs[best] = _cost(
                    sums[best], class_loads[best], ranks, models[:, best], 0.0, 0, 0.0, 0.0, slo_ms
                )
            num_moved += best != old
    return num_moved
