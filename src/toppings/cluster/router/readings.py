"""How things are with this router and its servers, as its dashboard shows it: sections of plain values."""

import math
import time
from collections import Counter
from heapq import nlargest, nsmallest
from typing import Any

from toppings import __version__
from toppings.cluster.router.cards import Cards
from toppings.cluster.router.state import RouterState
from toppings.cluster.router.upstream import Upstream
from toppings.dashboard.rows import MAX_ROWS, queue_section

UP = "up"
MAX_SERVERS = 50
"""That are told of."""
MAX_HOLDERS = 8
"""Servers that are named as having an adapter."""


class Readings:
    def __init__(self, state: RouterState) -> None:
        self._state = state
        self._started_at = int(time.time())

    async def read(self) -> dict[str, object]:
        state = self._state
        return {
            "at": round(time.time(), 3),
            "about": self._about(),
            "state": self._health(),
            "now": self._now(),
            "latency": state.recent.latency(),
            "history": state.recent.history(),
            "queue": self._queue(),
            "servers": self._servers(),
            "decisions": state.decisions.look(),
            "adapters": self._adapters(),
        }

    def _about(self) -> dict[str, Any]:
        config, policy = self._state.config, self._state.dispatcher.policy
        has_slo = math.isfinite(config.slo_tpt_ms)
        return {
            "kind": "router",
            "version": __version__,
            "policy": config.policy,
            "rule": policy.rule,
            "placement": config.placement,
            "slo_tpt_ms": config.slo_tpt_ms if has_slo else None,
            "started_at": self._started_at,
        }

    def _health(self) -> dict[str, str]:
        num, num_up = len(self._state.upstreams), int(self._state.fleet.is_open.sum())
        if not num_up:
            return {"word": "no server", "reason": ""}
        reason = f"{num - num_up} of {num} servers take no requests" if num_up < num else ""
        return {"word": "ready", "reason": reason}

    def _now(self) -> dict[str, Any]:
        """Requests that run or wait are those of all servers, however they came there."""
        recent, fleet = self._state.recent, self._state.fleet
        num_waiting = sum(map(len, fleet.queued))
        return {
            "open": len(self._state.flights),
            "running": int(fleet.num_requests.sum()) - num_waiting,
            "waiting": num_waiting,
            **recent.rates(),
            "ended": dict(recent.outcomes),
            "engine_age_s": 0,
        }

    def _queue(self) -> dict[str, Any]:
        """Requests on their way, by tenant and model; they wait until the first of an answer is there."""
        waiting: Counter[tuple[str, str]] = Counter()
        running: Counter[tuple[str, str]] = Counter()
        for flight in self._state.flights:
            key = (flight.place.account.name, flight.call.model or "base model")
            (running if flight.has_begun else waiting)[key] += 1
        return queue_section(waiting, running)

    def _servers(self) -> dict[str, Any]:
        """Those that are not up, then the busiest; of many only the first are told of."""
        upstreams, requests = list(self._state.upstreams.values()), self._state.fleet.num_requests.tolist()

        def order(row: int) -> tuple[bool, float]:
            return _state_of(upstreams[row]) == UP, -requests[row]

        is_all = len(upstreams) <= MAX_SERVERS
        rows = range(len(upstreams)) if is_all else nsmallest(MAX_SERVERS, range(len(upstreams)), key=order)
        told = [self._server(row, upstreams[row]) for row in rows]
        return {"rows": told, "num_more": len(upstreams) - len(told)}

    def _server(self, row: int, upstream: Upstream) -> dict[str, Any]:
        fleet, instance_id = self._state.fleet, upstream.instance_id
        num_waiting = len(fleet.queued[row])
        kv_total = float(fleet.kv_tokens_total[row])
        return {
            "id": instance_id,
            "url": upstream.config.url,
            "state": _state_of(upstream),
            "kind": str(upstream.kind),
            "running": int(fleet.num_requests[row]) - num_waiting,
            "waiting": num_waiting,
            "in_flight": len(self._state.flights.on(instance_id)),
            "kv_used": float(fleet.kv_tokens_used[row]),
            "kv_total": kv_total if math.isfinite(kv_total) else None,
            "on_device": len(fleet.on_device[row]),
            "on_host": len(fleet.on_host[row]),
        }

    # --- adapters ---

    def _adapters(self) -> dict[str, Any]:
        """Copies on devices and in host memory, and the rows of adapters with requests."""
        requests: Counter[str] = Counter()
        for active in self._state.fleet.active:
            requests.update(active)
        cards = self._cards()
        listed = [
            name for name in requests if any(name in each for each in cards)
        ]  # others have no real name
        busiest = nlargest(MAX_ROWS, listed, key=lambda name: (requests[name], name))
        return {
            "registered": max((len(each.by_name) - len(each.bases) for each in cards), default=0),
            "device": sum(map(len, self._state.fleet.on_device)),
            "host": sum(map(len, self._state.fleet.on_host)),
            "rows": [self.adapter_row(name) for name in busiest],
        }

    def adapter_row(self, name: str) -> dict[str, Any]:
        fleet = self._state.fleet
        return {
            "name": name,
            "device": _named(fleet.ids, [name in held for held in fleet.on_device]),
            "host": _named(fleet.ids, [name in held for held in fleet.on_host]),
            "requests": sum(active.get(name, 0) for active in fleet.active),
        }

    def adapter_names(self) -> list[str]:
        """Of all servers, in order."""
        cards = self._cards()
        names = {name for each in cards for name in each.by_name}
        return sorted(names.difference(*(each.bases for each in cards)))

    def _cards(self) -> list[Cards]:
        return [upstream.cards for upstream in self._state.upstreams.values() if upstream.cards is not None]


def _state_of(upstream: Upstream) -> str:
    if upstream.is_draining:
        return "draining"
    if upstream.is_alive:
        return UP
    return "silent" if upstream.is_silent else "down"


def _named(ids: list[str], holds: list[bool]) -> list[str]:
    """Those that hold it; where there are many, the first and how many more."""
    found = [each for each, is_holder in zip(ids, holds, strict=True) if is_holder]
    more = len(found) - MAX_HOLDERS
    return [*found[:MAX_HOLDERS], f"{more} more"] if more > 0 else found
