"""How things are with this server, as its dashboard shows it: sections of plain values."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from heapq import nlargest
from typing import Any

from toppings import __version__
from toppings.dashboard.feed import PERIOD_S
from toppings.dashboard.recent import Recent
from toppings.dashboard.rows import MAX_ROWS, queue_section
from toppings.engine.client import EngineDeadError
from toppings.messages import AdapterStatus, EngineStats, Span
from toppings.server.cold_starts import ToldColdStart
from toppings.server.metrics import is_resident
from toppings.server.state import ServerState

MAX_COLD = 12
COLD_TIMES = ("queue_ms", "read_ms", "copy_ms", "exposed_ms", "compute_ms", "first_token_ms")
ENGINE_WAIT_S = PERIOD_S / 2
"""A step may keep the engine from answering for longer: what the server itself knows is told meanwhile."""


class Readings:
    """One per application; used from its event loop only."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._asked: asyncio.Future[EngineStats] | None = None
        self._engine: EngineStats | None = None
        self._engine_at = time.monotonic()
        self._shown: tuple[tuple[int, list[AdapterStatus]], dict[str, Any]] | None = None

    async def read(self) -> dict[str, object]:
        engine, state = await self.engine(), self._state
        recent = state.metrics.recent
        return {
            "at": round(time.time(), 3),
            "about": self._about(),
            "state": self._health(),
            "now": self._now(engine, recent),
            "latency": recent.latency(),
            "history": recent.history(),
            "queue": self._queue(),
            "adapters": None if engine is None else self._adapters(engine),
            "cache": None if engine is None else _cache(engine),
            "workers": None if engine is None else _workers(engine),
            "cold": self._cold(),
        }

    async def engine(self) -> EngineStats | None:
        """What the engine told last; None where there is none."""
        if self._asked is None:
            self._asked = asyncio.ensure_future(self._state.client.stats())
        await asyncio.wait({self._asked}, timeout=ENGINE_WAIT_S)
        if self._asked is not None and self._asked.done():
            asked, self._asked = self._asked, None
            try:
                self._engine, self._engine_at = asked.result(), time.monotonic()
            except EngineDeadError:
                self._engine = None
        return self._engine

    # --- sections ---

    def _about(self) -> dict[str, Any]:
        state = self._state
        return {
            "kind": "server",
            "version": __version__,
            "model": state.base_name,
            "mode": state.config.engine.mode,
            "link_gbps": state.config.engine.link_gbps,
            "max_queue": state.config.server.max_queue,
            "max_num_seqs": state.client.info.max_num_seqs,
            "started_at": state.started_at,
        }

    def _health(self) -> dict[str, str]:
        state = self._state
        if state.is_draining:
            return {"word": "shutting down", "reason": ""}
        if not state.client.is_alive:
            return {"word": "no engine", "reason": state.client.down_reason}
        return {"word": "ready", "reason": ""}

    def _now(self, engine: EngineStats | None, recent: Recent) -> dict[str, Any]:
        """`engine_age_s`: how old what the engine told is, where that is worth a word."""
        age_s = time.monotonic() - self._engine_at
        return {
            "open": self._state.num_open,
            "running": 0 if engine is None else engine.num_running,
            "waiting": self._state.num_waiting,
            **recent.rates(),
            "ended": dict(recent.outcomes),
            "engine_age_s": round(age_s, 1) if age_s > 2 * PERIOD_S else 0,
            "restarts": 0 if engine is None else engine.counters.get("engine_restarts", 0),
            "preemptions": 0 if engine is None else engine.counters.get("preemptions", 0),
        }

    def _queue(self) -> dict[str, Any]:
        """Open requests by tenant and model: sequences that have had no token, requests that have."""
        waiting: Counter[tuple[str, str]] = Counter()
        running: Counter[tuple[str, str]] = Counter()
        for tenant, model, num_waiting in self._state.open_requests():
            waiting[tenant, model] += num_waiting
            running[tenant, model] += num_waiting == 0
        return queue_section(waiting, running)

    def _cold(self) -> dict[str, Any]:
        """The latest, newest first."""
        cold = self._state.cold_starts
        latest = [*cold][: -MAX_COLD - 1 : -1]
        rows = [cold_row(cold.num_noted - i, told) for i, told in enumerate(latest)]
        return {"num": cold.num_noted, "latest": rows}

    def _adapters(self, engine: EngineStats) -> dict[str, Any]:
        """Made anew only where an adapter has changed its place or its requests."""
        key = (self._state.registry.count(), engine.adapters)
        if self._shown is None or self._shown[0] != key:
            self._shown = (key, adapters_section(engine.adapters, self._state.name_of, key[0]))
        return {
            **self._shown[1],
            "host_bytes": [engine.host_bytes_used, engine.host_bytes_total],
            "device_bytes": [engine.device_bytes_used, engine.device_bytes_total],
        }


def adapters_section(
    adapters: list[AdapterStatus], name_of: Callable[[int], str], num_registered: int
) -> dict[str, Any]:
    """How many are where, each counted once at its fastest place, and the rows of those with most to show:
    loads under way, then requests, then hits."""
    places: Counter[str] = Counter()
    shown, idle = [], []
    for each in adapters:
        place = place_of(each)
        places[place] += 1
        if place == "loading" or each.num_running or each.num_waiting:
            shown.append(each)
        elif place == "device":
            idle.append(each)
    shown = nlargest(MAX_ROWS, shown, key=_weight)
    shown += nlargest(MAX_ROWS - len(shown), idle, key=lambda each: each.num_hits)
    return {
        "registered": num_registered,
        **{place: places[place] for place in ("device", "loading", "host", "reading")},
        "rows": [adapter_row(name_of(each.adapter_id), each) for each in shown],
    }


def place_of(status: AdapterStatus) -> str:
    """The fastest place that has it, or the way there: `reading` from disk, `loading` to the device."""
    if is_resident(status):
        return "device"
    if status.device_layers or status.num_running:
        return "loading"
    if status.is_on_host:
        return "host"
    return "reading" if status.num_waiting else "disk"


def _weight(status: AdapterStatus) -> tuple[bool, int, int]:
    return not is_resident(status), status.num_running + status.num_waiting, status.num_hits


def adapter_row(name: str, status: AdapterStatus | None) -> dict[str, Any]:
    if status is None:
        return {"name": name, "place": "disk"}
    return {
        "name": name,
        "place": place_of(status),
        "layers": status.device_layers,
        "num_layers": status.num_layers,
        "running": status.num_running,
        "waiting": status.num_waiting,
        "hits": status.num_hits,
        "is_pinned": status.is_pinned,
        "is_folded": status.is_folded,
    }


def cold_row(number: int, told: ToldColdStart) -> dict[str, Any]:
    """`number` counts cold starts. Of its layers, in order: `places`, where their products were computed;
    `copies` and `workers`, from and to when, in ms after the request's arrival."""
    cold = told.cold_start
    return {
        "number": number,
        "at": round(cold.arrived_at, 3),
        "request_id": told.request_id,
        "tenant": told.tenant,
        "adapter": told.adapter,
        "num_prompt_tokens": told.num_prompt_tokens,
        "tier": cold.tier,
        "rank": cold.rank,
        "num_bytes": cold.num_bytes,
        **{name: round(getattr(cold, name), 1) for name in COLD_TIMES},
        "places": [layer.place for layer in cold.layers],
        "copies": [_pair(layer.load) for layer in cold.layers],
        "workers": [_pair(layer.cpu) for layer in cold.layers],
    }


def _pair(span: Span | None) -> list[float] | None:
    return None if span is None else [round(span.from_ms, 1), round(span.to_ms, 1)]


def _cache(engine: EngineStats) -> dict[str, Any]:
    """Of keys and values, in tokens."""
    return {
        "used": engine.kv_pages_used * engine.page_size,
        "total": engine.kv_pages_total * engine.page_size,
        "prompt_tokens": engine.counters.get("prefix_cache_queries", 0),
        "found": engine.counters.get("prefix_cache_hits", 0),
    }


def _workers(engine: EngineStats) -> dict[str, Any] | None:
    """Of CPU assistance, counted since the engine's start; None without it."""
    counters = engine.counters
    if "assist_worker_restarts" not in counters:
        return None
    return {
        "alive": engine.num_workers,
        "restarts": counters["assist_worker_restarts"],
        "recomputed_slices": counters["assist_recomputed_slices"],
        "cpu_products": counters["assist_cpu_products"],
        "cold_products": counters["assist_cold_products"],
    }
