"""Why requests went where they went: what was known of the servers when each was placed.

Noted only while somebody looks, and in words for the log of requests: it takes about as long as the decision
itself.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from toppings.cluster.dispatcher import Dispatcher
from toppings.cluster.instances import DECODE, BoolArray, rows_with
from toppings.cluster.perf_model import FloatArray
from toppings.cluster.router.flight import Flight
from toppings.cluster.snapshot import Choice

WATCHED_S = 3.0
"""How long a look counts: dashboards look twice a second."""
MAX_KEPT = 30
MAX_SERVERS = 8
"""That a decision tells of: the chosen one, and of the others those with the fewest requests."""


@dataclass(frozen=True, slots=True)
class View:
    """The servers before the request was placed, as columns [N]: what it would find there and bring about.

    `on_device`, `on_host`, `homes` are rows; the last are empty without a placement.
    """

    ids: list[str]
    is_open: BoolArray
    has_model: BoolArray
    requests: FloatArray
    step_ms: FloatArray
    load_ms: FloatArray
    on_device: set[int]
    on_host: set[int]
    homes: set[int]
    tried: frozenset[str]
    moved_to: str | None


class Decisions:
    """The latest, newest first. `clock` is in seconds and never goes back."""

    def __init__(self, dispatcher: Dispatcher, clock: Callable[[], float] = time.monotonic) -> None:
        self._dispatcher, self._clock = dispatcher, clock
        self._looked_at = -math.inf
        self._kept: deque[dict[str, Any]] = deque(maxlen=MAX_KEPT)
        self._num_noted = 0

    def look(self) -> list[dict[str, Any]]:
        self._looked_at = self._clock()
        return list(self._kept)

    @property
    def _is_watched(self) -> bool:
        return self._clock() - self._looked_at <= WATCHED_S

    def view(self, flight: Flight, has_model: BoolArray) -> View | None:
        """To be taken before the request is placed; None while nobody looks and no log tells of it.
        `has_model` [N]."""
        if not (flight.tells_why or self._is_watched):
            return None
        fleet, plan, request = self._dispatcher.fleet, self._dispatcher.plan, flight.request
        adapter = request.adapter
        homes = fleet.rows_of(plan.homes_of(adapter)) if plan is not None and adapter is not None else []
        return View(
            ids=list(fleet.ids),
            is_open=fleet.is_open.copy(),
            has_model=has_model,
            requests=fleet.num_requests.copy(),
            step_ms=fleet.step_ms_with(request)[DECODE],
            load_ms=fleet.load_ms(request),
            on_device=set() if adapter is None else set(rows_with(adapter, fleet.on_device)),
            on_host=set() if adapter is None else set(rows_with(adapter, fleet.on_host)),
            homes=set(homes),
            tried=frozenset(flight.tried),
            moved_to=flight.move_to,
        )

    def note(self, flight: Flight, view: View, choice: Choice | None) -> None:
        if choice is None:
            return
        flight.why = _why(view, choice)
        if not self._is_watched:
            return
        self._num_noted += 1
        request = flight.request
        self._kept.appendleft(
            {
                "number": self._num_noted,
                "at": round(time.time(), 3),
                "request_id": flight.client_id,
                "tenant": flight.place.account.name,
                "model": flight.call.model or "",
                "prompt_tokens": request.prompt_tokens,
                "server": choice.instance_id,
                "why": flight.why,
                "servers": [_server(view, row, choice, request.adapter) for row in _rows(view, choice)],
            }
        )


def _rows(view: View, choice: Choice) -> list[int]:
    others = np.lexsort((view.requests, ~(view.is_open & view.has_model)))[:MAX_SERVERS].tolist()
    return [choice.row, *[row for row in others if row != choice.row][: MAX_SERVERS - 1]]


def _server(view: View, row: int, choice: Choice, adapter: str | None) -> dict[str, Any]:
    place = "" if adapter is None else "disk"
    place = "device" if row in view.on_device else "host" if row in view.on_host else place
    return {
        "id": view.ids[row],
        "is_chosen": row == choice.row,
        "why_not": _why_not(view, row),
        "requests": int(view.requests[row]),
        "place": place + (", a home" if row in view.homes else ""),
        "load_ms": None if adapter is None else round(float(view.load_ms[row]), 2),
        "step_ms": round(float(view.step_ms[row]), 2),
    }


def _why_not(view: View, row: int) -> str:
    """Empty for one that could be chosen."""
    if not view.is_open[row]:
        return "closed"
    if not view.has_model[row]:
        return "has not the model"
    return "did not take it" if view.ids[row] in view.tried else ""


def _why(view: View, choice: Choice) -> str:
    """In words: what was out of the ordinary, and how the chosen one compares."""
    rows = [
        r for r in np.flatnonzero(view.is_open & view.has_model).tolist() if view.ids[r] not in view.tried
    ]
    said = []
    if view.tried:
        said.append(f"{', '.join(sorted(view.tried))} did not take it")
    if view.moved_to == choice.instance_id:
        said.append("moved while it waited")
    elif rows == [choice.row]:
        said.append("no other could take it")
    else:
        said += _compared(view, rows, choice.row)
    if choice.breaks_slo:
        said.append("none keeps the objective")
    return "; ".join(said)


def _compared(view: View, rows: list[int], row: int) -> list[str]:
    said = []
    if row in view.homes:
        said.append("a home of its adapter")
    if row in view.on_device:
        said.append("has the adapter on its device")
    elif row in view.on_host:
        said.append("has the adapter in host memory")
    for what, column in (("requests", view.requests), ("ms added to load it", view.load_ms)):
        if column[row] <= column[rows].min() < column[rows].max():
            said.append(f"fewest {what}")
    if view.step_ms[row] <= view.step_ms[rows].min() < view.step_ms[rows].max():
        said.append("shortest step")
    return said or [f"the policy's choice of {len(rows)}"]
