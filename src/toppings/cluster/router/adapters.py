"""Adapter administration for the whole fleet: every server gets it, one that was away when it is back.

A server that refuses (any HTTP error) makes a load fail for all: those that did it undo it. A server that
cannot be reached, or does not answer in time, keeps nobody else: the answer names it, and `sync` brings it up
to date. What one change does to one server is done while nobody else changes that server. `sync` waits for no
change: a name that is being changed is left to that, and a server that it did not reach to the next `sync`.
"""

import asyncio
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

from toppings.cluster.router.calls import MAX_NAME_LEN
from toppings.cluster.router.memory import AdapterMemory, Entry
from toppings.cluster.router.replies import ApiError, out_of_time, unavailable
from toppings.cluster.router.state import RouterState
from toppings.cluster.router.upstream import CALL_FAILURES, Answer, Kind, Upstream
from toppings.exchanges.audit_log import Change
from toppings.tenants.book import ADMIN
from toppings.tenants.tenant import Tenant

logger = logging.getLogger(__name__)

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
LOADED_ALREADY = "already been loaded"
MAX_TOLD = 20


@dataclass(slots=True)
class Outcome:
    """What the servers did: their answers, and why others have not done it."""

    answers: dict[Upstream, Answer] = field(default_factory=dict)
    failures: dict[Upstream, str] = field(default_factory=dict)

    def success(self, away: list[Upstream], tenant: Tenant) -> Answer:
        """A server's own answer, and which servers will follow; tenants are told how many."""
        answer = next(answer for answer in self.answers.values() if answer.status < 400)
        late = [f"{u.instance_id} ({why})" for u, why in self.failures.items()]
        late += [f"{u.instance_id} (it is down)" for u in away]
        if not late:
            return answer
        if not tenant.is_admin:
            num = f"{len(late)} server{'s' if len(late) > 1 else ''}"
            return Answer(answer.status, f"{answer.text} Not yet on {num}: done there later.".encode())
        more = f", and {len(late) - MAX_TOLD} others" if len(late) > MAX_TOLD else ""
        text = f"{answer.text} Not yet on {', '.join(late[:MAX_TOLD])}{more}: done when it answers again."
        return Answer(answer.status, text.encode())


class AdapterAdmin:
    """Changes of one name come one after the other; changes of others are made beside them."""

    def __init__(self, state: RouterState) -> None:
        self._state = state
        self._memory = AdapterMemory(state.config.state_file)
        self._names: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._refreshing: asyncio.Task[None] | None = None

    async def load(self, body: dict[str, Any], tenant: Tenant = ADMIN) -> Answer:
        """The servers' answer. Raises ApiError 503 where none can be reached, 504 where none answers."""
        name, path = _name(body), str(body.get("lora_path"))
        if body.get("merge") is not None:
            raise ApiError(
                400,
                "merge: each server merges of the adapters that it has at that moment; send it to the servers"
                " themselves, and the router sends requests to those that have the merge",
                param="merge",
            )
        async with self._alone(name):
            away = self._away()
            outcome = await self._ask_all(LOAD, body, tenant)
            answers = outcome.answers
            refusals = {u: a for u, a in answers.items() if a.status >= 400}
            had_it = [u for u, answer in refusals.items() if LOADED_ALREADY in answer.text]
            if refusals and (len(had_it) < len(refusals) or len(had_it) == len(answers)):
                if not body.get("load_inplace"):
                    await self._undo(name, outcome)
                return next(a for u, a in refusals.items() if len(had_it) == len(answers) or u not in had_it)
            await self._remember(name, body, list(answers))
            await self._state.directory.learn_paths([(name, path)], again=True)
            await self._refresh_all(list(answers))
            self._leave_to_sync(list(answers))
            return outcome.success(away, tenant)

    async def _undo(self, name: str, outcome: Outcome) -> None:
        """Where it was done, and where nobody knows: such a server is rid of it when it is back."""
        done = [u for u, answer in outcome.answers.items() if answer.status < 400]
        undone = await asyncio.gather(*(self._ask(u, UNLOAD, {"lora_name": name}) for u in done))
        are_sure = all(isinstance(each, Answer) for each in undone) and not outcome.failures
        if not are_sure and self._memory.get(name) is None:
            reached = [u for u, each in zip(done, undone, strict=True) if isinstance(each, Answer)]
            await self._remember(name, None, reached)
            self._leave_to_sync(reached)

    async def unload(self, body: dict[str, Any], tenant: Tenant = ADMIN) -> Answer:
        """The servers' answer: done where any had the adapter, else the refusal. Raises as `load`."""
        name = _name(body)
        async with self._alone(name):
            away = self._away()
            outcome = await self._ask_all(UNLOAD, body, tenant)
            answers = list(outcome.answers.values())
            failed = [a for a in answers if a.status >= 400 and a.status != 404]
            if failed or not any(answer.status < 400 for answer in answers):
                return (failed or answers)[0]
            await self._remember(name, None, list(outcome.answers))
            await self._refresh_all(list(outcome.answers))
            self._leave_to_sync(list(outcome.answers))
            return outcome.success(away, tenant)

    def _alone(self, name: str) -> asyncio.Lock:
        """To be held while the name is changed; it is forgotten with the last one who holds or awaits it."""
        return self._names.setdefault(name, asyncio.Lock())

    def _is_changing(self, name: str) -> bool:
        lock = self._names.get(name)
        return lock is not None and lock.locked()

    # --- what a placement asks of one server ---

    def remembers(self, name: str) -> bool:
        """Whether the fleet as a whole was told of this name."""
        return self._memory.get(name) is not None or self._is_changing(name)

    async def place(self, upstream: Upstream, name: str, path: str) -> bool:
        """Load what others have there, too. What a server refuses it is not asked for again until it has been
        away.
        """
        async with self._alone(name):
            if self._memory.get(name) is not None:
                return False
            with self._audit("place", upstream, name) as change:
                answer = await self._ask(upstream, LOAD, {"lora_name": name, "lora_path": path})
                change.failure = failure_of(answer)
            if isinstance(answer, Answer) and answer.status < 400:
                upstream.placed.add(name)
                await self._refresh(upstream)
                return True
        if isinstance(answer, Answer):
            upstream.refused.add(name)
            logger.warning("%s refused %s for its placement: %s", upstream.instance_id, name, answer.text)
        return False

    async def displace(self, upstream: Upstream, name: str) -> bool:
        """Unload what was placed there."""
        async with self._alone(name):
            upstream.placed.discard(name)
            if self._memory.get(name) is not None:
                return False
            with self._audit("displace", upstream, name) as change:
                answer = await self._ask(upstream, UNLOAD, {"lora_name": name})
                change.failure = failure_of(answer)
            await self._refresh(upstream)
        return isinstance(answer, Answer) and answer.status < 400

    def _audit(self, action: str, upstream: Upstream, name: str) -> AbstractContextManager[Change]:
        return self._state.audit.change(action, adapter=name, instance=upstream.instance_id)

    # --- one server at a time ---

    async def sync(self, upstream: Upstream) -> None:
        """Read what a server has, and load and unload what it missed, but for names that are just being
        changed: what the fleet should have of those is not known yet. Raises CALL_FAILURES.

        One that does not answer a change in time is left as it is until the next time.
        """
        await upstream.read_cards()
        for name in self._memory.names():
            async with upstream.changing:
                is_in_time = self._is_changing(name) or await self._catch_up(upstream, name)
            if not is_in_time:
                break
            await self._drop_if_done(name)
        await self._refresh(upstream)

    async def _catch_up(self, upstream: Upstream, name: str) -> bool:
        """Bring one adapter up to date; False where the server gives no answer in time."""
        entry, listed = self._memory.get(name), upstream.cards
        if entry is None:
            return True
        request = _missed(name, entry, upstream, is_listed=listed is not None and name in listed)
        if request is None:
            upstream.applied[name] = entry.version
            return True
        try:
            answer = await upstream.change(*request)
        except TimeoutError:
            logger.warning("%s gave no answer to %s of %s in time", upstream.instance_id, request[0], name)
            return False
        if answer.status < 400:
            upstream.applied[name] = entry.version
        else:
            logger.warning("%s refused %s of %s: %s", upstream.instance_id, request[0], name, answer.text)
        return True

    async def _ask(
        self, upstream: Upstream, path: str, body: dict[str, Any], tenant: Tenant = ADMIN
    ) -> Answer | str:
        """Its answer, or why there is none."""
        limit_s = upstream.settings.admin_timeout_s
        try:
            async with asyncio.timeout(limit_s), upstream.changing:
                return await upstream.change(path, body, tenant)
        except CALL_FAILURES as error:
            logger.warning("%s: %s failed: %r", upstream.instance_id, path, error)
            upstream.synced_at = None
            if not upstream.is_alive:
                return "it went down"
            return f"no answer in {limit_s:g} s" if isinstance(error, TimeoutError) else "no answer"

    async def _ask_all(self, path: str, body: dict[str, Any], tenant: Tenant) -> Outcome:
        """Raises ApiError where no server answered."""
        alive = [upstream for upstream in self._state.upstreams.values() if upstream.is_alive]
        outcome = Outcome()
        for upstream, told in zip(
            alive, await asyncio.gather(*(self._ask(u, path, body, tenant) for u in alive)), strict=True
        ):
            if isinstance(told, Answer):
                outcome.answers[upstream] = told
            else:
                outcome.failures[upstream] = told
        retry_after_s = self._state.config.retry_after_s
        if not alive:
            raise unavailable("no server is up", retry_after_s)
        if not outcome.answers:
            told = ", ".join(f"{u.instance_id}: {why}" for u, why in outcome.failures.items())
            named = f": {told}" if tenant.is_admin else ""
            raise out_of_time(f"no server answered{named}", retry_after_s)
        return outcome

    def _away(self) -> list[Upstream]:
        return [u for u in self._state.upstreams.values() if not u.is_alive and not u.is_removed]

    async def _remember(self, name: str, body: dict[str, Any] | None, reached: list[Upstream]) -> None:
        version = await self._memory.note(name, body)
        for upstream in reached:
            upstream.applied[name] = version
        await self._drop_if_done(name)

    def _leave_to_sync(self, reached: list[Upstream]) -> None:
        """The others are due at once. The last of a change: what looks at them while its name is not free
        passes over it, and would come again an interval later."""
        for upstream in self._state.upstreams.values():
            if upstream not in reached:
                upstream.synced_at = None

    async def _drop_if_done(self, name: str) -> None:
        """An unload that every server has done is remembered no longer."""
        entry, upstreams = self._memory.get(name), self._state.upstreams.values()
        if entry is None or entry.body is not None:
            return
        if all(upstream.applied.get(name) == entry.version for upstream in upstreams):
            for upstream in upstreams:
                del upstream.applied[name]
            await self._memory.drop(name)

    # --- what servers have ---

    @property
    def is_refreshing(self) -> bool:
        return self._refreshing is not None and not self._refreshing.done()

    async def refresh(self) -> None:
        """Read again which models the servers have; one that takes long is not waited for.

        Whoever comes while that goes on waits for it, too.
        """
        if self._refreshing is None or not self.is_refreshing:
            alive = [upstream for upstream in self._state.upstreams.values() if upstream.is_alive]
            self._refreshing = asyncio.create_task(self._refresh_all(alive))
        await asyncio.wait([self._refreshing], timeout=self._state.config.health_timeout_s)

    async def _refresh_all(self, upstreams: list[Upstream]) -> None:
        await asyncio.gather(*(self._refresh(upstream) for upstream in upstreams))

    async def _refresh(self, upstream: Upstream) -> None:
        directory = self._state.directory
        try:
            await upstream.read_cards()
            self._state.models_changed()
            listed = await upstream.read_adapters()
            if listed is not None:
                await directory.learn_list(listed)
            elif upstream.cards is not None and upstream.kind is not Kind.TOPPINGS:
                paths = [(card.id, card.path) for card in upstream.cards.by_name.values()]
                await directory.learn_paths((name, path) for name, path in paths if path)
        except (*CALL_FAILURES, ValueError, RecursionError) as error:
            logger.warning("%s: cannot read its adapters: %r", upstream.instance_id, error)


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


def failure_of(answer: Answer | str) -> str:
    """Why a server has not done something; empty where it has."""
    if isinstance(answer, str):
        return answer
    return answer.text or f"status {answer.status}" if answer.status >= 400 else ""


def _name(body: dict[str, Any]) -> str:
    """Raises ApiError 400 for what no server takes as an adapter's name."""
    name = body.get("lora_name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LEN:
        text = f"lora_name must be a text of 1 to {MAX_NAME_LEN} characters"
        raise ApiError(400, f"1 validation error:\n  {text}", param="lora_name")
    return name


def require_object(body: Any) -> dict[str, Any]:
    """Raises ApiError 400 where a JSON body is no object."""
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(body).__name__}")
    return body
