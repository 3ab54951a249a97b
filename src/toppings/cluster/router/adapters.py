"""Adapter administration for the whole fleet: every server gets it, one that was away when it is back.

A server that refuses (any HTTP error) makes a load fail for all: those that did it undo it. A server that
cannot be reached is brought up to date by `sync` later.
"""

import asyncio
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toppings.cluster.router.replies import ApiError, unavailable
from toppings.cluster.router.state import RouterState
from toppings.cluster.router.upstream import CALL_FAILURES, Answer, Upstream

logger = logging.getLogger(__name__)

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
LOADED_ALREADY = "already been loaded"
LOAD_TIMEOUT_S = 300.0


@dataclass(slots=True)
class Entry:
    """What the fleet should have under a name: the load request's body, or None where it was unloaded."""

    version: int
    body: dict[str, Any] | None


class AdapterAdmin:
    """Remembers what was loaded and unloaded through the router; on disk too, where a `state_file` is set."""

    def __init__(self, state: RouterState) -> None:
        self._state = state
        self._lock = asyncio.Lock()
        self._file = Path(state.config.state_file) if state.config.state_file else None
        self._entries = self._read()

    async def load(self, body: dict[str, Any]) -> Answer:
        """The servers' answer; raises ApiError 503 where none can be reached."""
        name, path = body.get("lora_name"), body.get("lora_path")
        async with self._lock:
            answers = await self._ask_all(LOAD, body)
            refusals = {u: a for u, a in answers.items() if a.status >= 400}
            had_it = [u for u, answer in refusals.items() if LOADED_ALREADY in answer.text]
            if refusals and (len(had_it) < len(refusals) or len(had_it) == len(answers)):
                done = [u for u, answer in answers.items() if answer.status < 400]
                if not body.get("load_inplace"):
                    await asyncio.gather(*(self._ask(u, UNLOAD, {"lora_name": name}) for u in done))
                return next(a for u, a in refusals.items() if len(had_it) == len(answers) or u not in had_it)
            self._remember(str(name), body, list(answers))
            self._state.directory.learn_path(str(name), str(path))
            await self._refresh(list(answers))
            return next(answer for answer in answers.values() if answer.status < 400)

    async def unload(self, body: dict[str, Any]) -> Answer:
        """The servers' answer: done where any had the adapter, else the refusal."""
        async with self._lock:
            answers = await self._ask_all(UNLOAD, body)
            done = [answer for answer in answers.values() if answer.status < 400]
            failed = [a for a in answers.values() if a.status >= 400 and a.status != 404]
            if failed or not done:
                return (failed or list(answers.values()))[0]
            self._remember(str(body.get("lora_name")), None, list(answers))
            await self._refresh(list(answers))
            return done[0]

    async def sync(self, upstream: Upstream) -> None:
        """Read what a server has, and load and unload what it missed. Raises CALL_FAILURES."""
        async with self._lock:
            await upstream.read_cards()
            listed = upstream.cards or {}
            for name, entry in self._entries.items():
                request = _missed(name, entry, upstream, is_listed=name in listed)
                if request is None:
                    upstream.applied[name] = entry.version
                    continue
                answer = await upstream.call("POST", request[0], request[1], LOAD_TIMEOUT_S)
                if answer.status < 400:
                    upstream.applied[name] = entry.version
                else:
                    logger.warning(
                        "%s refused %s of %s: %s", upstream.instance_id, request[0], name, answer.text
                    )
            await self._refresh([upstream])

    async def refresh(self) -> None:
        """Read again which models the servers have."""
        await self._refresh([upstream for upstream in self._state.upstreams.values() if upstream.is_alive])

    async def _refresh(self, upstreams: list[Upstream]) -> None:
        await asyncio.gather(*(self._refresh_one(upstream) for upstream in upstreams))
        self._state.models_changed()

    async def _refresh_one(self, upstream: Upstream) -> None:
        directory = self._state.directory
        try:
            await upstream.read_cards()
            for card in (upstream.cards or {}).values():
                if card.get("parent") and isinstance(card.get("root"), str):
                    directory.learn_path(card["id"], card["root"])
            directory.learn_list(await upstream.read_adapters())
        except CALL_FAILURES as error:
            logger.warning("%s: cannot read its adapters: %r", upstream.instance_id, error)

    async def _ask_all(self, path: str, body: dict[str, Any]) -> dict[Upstream, Answer]:
        alive = [upstream for upstream in self._state.upstreams.values() if upstream.is_alive]
        answers = await asyncio.gather(*(self._ask(upstream, path, body) for upstream in alive))
        reached = {u: answer for u, answer in zip(alive, answers, strict=True) if answer is not None}
        if not reached:
            raise unavailable("no server is up", self._state.config.retry_after_s)
        return reached

    async def _ask(self, upstream: Upstream, path: str, body: dict[str, Any]) -> Answer | None:
        try:
            return await upstream.call("POST", path, body, LOAD_TIMEOUT_S)
        except CALL_FAILURES as error:
            logger.warning("%s: %s failed: %r", upstream.instance_id, path, error)
            upstream.synced_at = None
            return None

    # --- memory ---

    def _remember(self, name: str, body: dict[str, Any] | None, reached: list[Upstream]) -> None:
        version = self._entries[name].version + 1 if name in self._entries else 1
        self._entries[name] = Entry(version, body)
        for upstream in reached:
            upstream.applied[name] = version
        if self._file is not None:
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps({name: asdict(entry) for name, entry in self._entries.items()}))
            os.replace(part, self._file)

    def _read(self) -> dict[str, Entry]:
        if self._file is None or not self._file.exists():
            return {}
        try:
            return {name: Entry(**entry) for name, entry in json.loads(self._file.read_text()).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"state_file {self._file} cannot be read: {error}; move it away") from error


def _missed(
    name: str, entry: Entry, upstream: Upstream, *, is_listed: bool
) -> tuple[str, dict[str, Any]] | None:
    """The request that brings a server up to date on one adapter; None where it is.

    One that lists an adapter which this router never loaded there has it from before: it is taken as current.
    """
    if entry.body is None:
        has_missed = is_listed and upstream.applied.get(name) != entry.version
        return (UNLOAD, {"lora_name": name}) if has_missed else None
    if not is_listed:
        return LOAD, {key: value for key, value in entry.body.items() if key != "load_inplace"}
    is_current = upstream.applied.get(name, entry.version) == entry.version
    return None if is_current else (LOAD, {**entry.body, "load_inplace": True})


def require_object(body: Any) -> dict[str, Any]:
    """Raises ApiError 400 where a JSON body is no object."""
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(body).__name__}", "Bad Request")
    return body
