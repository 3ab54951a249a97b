"""How many replicas Serve keeps: as many as the demand needs within the objective.

    request router: finds the number -> front -> each replica: tells it as a statistic -> `by_demand`

Serve calls the policy in a process of its own, which sees nothing of us but the replicas' statistics. It
takes this module there by value, so that it imports nothing of ours. No Ray here.
"""

import math
from typing import Any

WANTED = "wanted_replicas"
"""Name of the statistic; 0 where a replica has heard of no number lately."""
KEPT_S = 30.0
"""How long a number holds: a front that has gone says nothing."""
DOWN_SHARE = 1 / 8
"""Of the replicas, that may go at once (one, of few). Every adapter that is in demand has two homes, so that
most keep one; before Serve's next step down, `downscale_delay_s` later, plans have given them a second again.
"""


class Wanted:
    """What a replica was told last. Instants in seconds."""

    def __init__(self) -> None:
        self._num_replicas, self._told_at = 0, -math.inf

    def note(self, num_replicas: int, now: float) -> None:
        self._num_replicas, self._told_at = num_replicas, now

    def stats(self, now: float) -> dict[str, float]:
        return {WANTED: float(self._num_replicas if now - self._told_at <= KEPT_S else 0)}


def by_demand(context: Any) -> tuple[int, dict[str, Any]]:
    """A Serve autoscaling policy: of a `ray.serve.config.AutoscalingContext`, how many replicas there should
    be, and nothing to be remembered. Serve applies its bounds and delays.

    The largest of the numbers that replicas told last counts: one may not have heard of the newest. Where
    none tells of any, they stay as many as they should be now.
    """
    told = [series[-1].value for series in (context.raw_metrics or {}).get(WANTED, {}).values() if series]
    wanted, now = max(told, default=0.0), context.target_num_replicas
    if not wanted:
        return now, {}
    return max(math.ceil(wanted), now - max(1, math.floor(DOWN_SHARE * now))), {}
