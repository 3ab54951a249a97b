"""How things are with this router and its servers, as its dashboard shows it: sections of plain values."""

import math
import time
from collections import Counter
from heapq import nlargest
from typing import Any

from toppings import __version__
from toppings.cluster.router.cards import Cards
from toppings.cluster.router.state import RouterState
from toppings.cluster.router.upstream import Upstream
from toppings.dashboard.rows import MAX_ROWS, queue_section

MAX_HOLDERS = 8
"""Servers that are named as having an adapter."""


class Readings:
    def __init__(self, state: RouterState) -> None:
        self._state = state
        self._started_at = int(time.time())

    async def read(self) -> dict[str, object]:
        state = self._state
        servers = [self._server(row, each) for row, each in enumerate(state.upstreams.values())]
        return {
            "at": round(time.time(), 3),
            "about": self._about(),
            "state": self._health(servers),
            "now": self._now(servers),
            "latency": state.recent.latency(),
            "history": state.recent.history(),
            "queue": self._queue(),
            "servers": servers,
            "decisions": state.decisions.look(),
            "adapters": self._adapters(servers),
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

    def _health(self, servers: list[dict[str, Any]]) -> dict[str, str]:
        down = [each["id"] for each in servers if each["state"] != "up"]
        if len(down) == len(servers):
            return {"word": "no server", "reason": ""}
        reason = f"{len(down)} of {len(servers)} servers take no requests" if down else ""
        return {"word": "ready", "reason": reason}

    def _now(self, servers: list[dict[str, Any]]) -> dict[str, Any]:
        """Requests that run or wait are those of all servers, however they came there."""
        recent = self._state.recent
        return {
            "open": len(self._state.flights),
            "running": sum(each["running"] for each in servers),
            "waiting": sum(each["waiting"] for each in servers),
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

    def _adapters(self, servers: list[dict[str, Any]]) -> dict[str, Any]:
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
            "device": sum(each["on_device"] for each in servers),
            "host": sum(each["on_host"] for each in servers),
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
        return "up"
    return "silent" if upstream.is_silent else "down"


def _named(ids: list[str], holds: list[bool]) -> list[str]:
    """Those that hold it; where there are many, the first and how many more."""
    found = [each for each, is_holder in zip(ids, holds, strict=True) if is_holder]
    more = len(found) - MAX_HOLDERS
    return [*found[:MAX_HOLDERS], f"{more} more"] if more > 0 else found
