"""Adapters that come when a request first names them, from the configured sources (`sources/adapters.py`).

A name that is not registered is looked for once, whoever waits for it; what is found is fetched, checked and
packed in threads, registered and served. Where all such adapters are too large together, the least recently
asked for leave again.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Coroutine
from functools import partial
from weakref import WeakValueDictionary

from toppings.adapters.errors import AdapterError
from toppings.adapters.registry import AdapterRecord, AdapterRegistry, Origin
from toppings.config import ServerConfig
from toppings.server.adapters import AdapterAdmin
from toppings.server.daemon_threads import DaemonThreads
from toppings.server.errors import ApiError, unavailable
from toppings.server.grants import Grants, mark_of
from toppings.server.lookups import MAX_PENDING, Lookups, not_given
from toppings.server.source_cache import SourceCache
from toppings.server.state import ServerState, Target
from toppings.sources.adapters import (
    PRIVATE,
    AdapterSource,
    Found,
    clear_fetches,
    find_adapter,
    find_again,
    find_reference,
    is_safe_name,
    kind_of,
    new_part,
    owner_of,
    parse_source,
)
from toppings.sources.fetch import FetchError, FetchNotFound, Room
from toppings.tenants.book import ADMIN
from toppings.tenants.tenant import Tenant
from toppings.vital import log_failure

logger = logging.getLogger(__name__)

FETCHES_AT_ONCE = 4
SHORT_AT_ONCE = 4
MAX_REFRESHES = 16
"""Sources asked for new revisions at once; others are asked at a later request."""
AGAIN = "again"
"""Stands for a kind of source in the key of what was damaged."""


class Resolver:
    """Used from the server's event loop only."""

    def __init__(self, state: ServerState, admin: AdapterAdmin) -> None:
        self._state, self._admin = state, admin
        self._config = state.config.server
        self.sources = [parse_source(text) for text in self._config.adapter_source]
        # None waits for another's: a look-up of a place that hangs keeps its own thread only, of which there
        # are as many as look-ups, a fetch those of fetches.
        self._looks = DaemonThreads(3 * MAX_PENDING + MAX_REFRESHES, "toppings-look")
        self._fetches = DaemonThreads(FETCHES_AT_ONCE, "toppings-fetch")
        self._short = DaemonThreads(SHORT_AT_ONCE, "toppings-files")
        self._lookups: Lookups[AdapterRecord] = Lookups()
        self._loads: Lookups[AdapterRecord] = Lookups(remembers=False)
        self._grants = Grants(self._find, self._config.source_refresh_s)
        self._rooms: set[Room] = set()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._checked: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_refreshing = 0
        self._held = SourceCache(state.registry)

    async def resolve(
        self, name: str, *, kind: str | None = None, token: str | None = None
    ) -> AdapterRecord | None:
        """The adapter of this name, fetched where need be; None where no source may be asked for it.

        `kind`: of the only sources that may be asked (dir, hub, s3, ...). Raises ApiError with the reason.
        """
        record = self._state.registry.find_named(name)
        if record is not None and record.origin is not Origin.SOURCE:
            return record
        if record is None and not self._may_ask(name, kind):
            return None
        key = (name, kind or "", mark_of(token))
        if record is None:
            record = await self._lookups.once(key, partial(self._bring, name, kind, token))
        else:
            self._refresh(name)
        if record.path.startswith(PRIVATE):
            await self._grants.check(name, kind_of(record.path), token)
        self._held.touch(name)
        return record

    async def repair(self, target: Target) -> Target | None:
        """The adapter of a request that has failed: fetched again where its packed file is damaged and came
        from a source, None where that is not why. Raises ApiError where it cannot be had."""
        registry = self._state.registry
        record = registry.find_named(target.name)
        if record is None or record.is_made_here:  # those the engine makes again itself
            return None
        if record.adapter_id == target.adapter_id:
            if await self._short.run(registry.is_intact, record.adapter_id):
                return None
            logger.warning("the packed file of adapter %s is damaged; it is fetched again", record.name)
            key = (record.name, AGAIN, "")
            record = await self._lookups.once(key, partial(self._bring_again, record))
        return Target(record.name, record.adapter_id, record.vocabulary)

    def has(self, kind: str) -> bool:
        """Whether a source of this kind is configured."""
        return any(source.kind == kind for source in self.sources)

    def close(self) -> None:
        """Whoever waits for a source is answered 503; what is being fetched is given up, not waited for."""
        for lookups in (self._lookups, self._loads, self._grants):
            lookups.close()
        for room in self._rooms:
            room.give_up()

    def has_place(self, reference: str) -> bool:
        """Whether a source may be asked for `reference`, its own spelling of a place."""
        return owner_of(self.sources, reference) is not None

    async def load(self, name: str, reference: str, *, in_place: bool, tenant: Tenant) -> AdapterRecord:
        """Registers what a source has at `reference`, its own spelling of a place; those who ask for the same
        at once share it. Raises ApiError."""

        async def bring() -> AdapterRecord:
            try:
                found = await self._looks.run(find_reference, self.sources, reference)
            except FetchNotFound as error:
                raise ApiError(404, f"Loading lora {name} failed: {error}", "NotFoundError") from error
            except AdapterError as error:
                raise ApiError(502, f"Loading lora {name} failed: {error}", "BadGatewayError") from error
            assert found is not None  # `has_place`
            return await self._take(name, found, in_place=in_place, origin=Origin.HTTP, tenant=tenant)

        key = (name, reference, tenant.name, str(in_place))
        return await self._loads.once(key, bring)

    async def _take(
        self,
        name: str,
        found: Found,
        *,
        in_place: bool,
        origin: Origin,
        is_private: bool = False,
        tenant: Tenant = ADMIN,
        over: AdapterRecord | None = None,
    ) -> AdapterRecord:
        """Fetches and registers what was found; with `over`, in its place and in no other's. Raises
        ApiError."""
        room = Room(self._config.source_max_bytes, self._config.source_timeout_s)
        self._rooms.add(room)
        part = new_part(self._state.registry.state_dir)
        try:
            path = found.path
            if path is None:
                path = await self._fetches.run(found.bring, part, room)
            return await self._admin.register_found(
                name,
                path,
                found.root or path,
                in_place=in_place or over is not None,
                origin=origin,
                source=f"{PRIVATE}{found.where}" if is_private else found.where,
                tenant=tenant,
                over=over,
            )
        except FetchError as error:
            raise not_given(name, error) from error
        finally:
            self._rooms.discard(room)
            room.give_up()
            if found.path is None:
                await self._short.run(partial(shutil.rmtree, part, ignore_errors=True))

    def _may_ask(self, name: str, kind: str | None) -> bool:
        if not is_safe_name(name, self._state.base_name):
            return False
        return any(kind in (None, each.kind) and each.allows(name) for each in self.sources)

    async def _bring(self, name: str, kind: str | None, token: str | None) -> AdapterRecord:
        """Whoever asks for it otherwise meanwhile waits for the same fetch."""
        try:
            found = await self._find(name, kind, token)
        except FetchError as error:
            raise not_given(name, error) from error
        is_private = token is not None and found.files is not None and found.files.is_restricted
        async with self._turns.setdefault(name, asyncio.Lock()):
            old = self._state.registry.find_named(name)
            if old is None:
                old = await self._bring_found(name, found, is_private=is_private)
        if is_private and old.path == f"{PRIVATE}{found.where}":
            self._grants.note(name, token)
        return old

    async def _bring_found(
        self, name: str, found: Found, *, is_private: bool = False, over: AdapterRecord | None = None
    ) -> AdapterRecord:
        """Nothing that a client has loaded or unloaded by this name meanwhile is undone."""
        try:
            record = await self._take(
                name, found, in_place=False, origin=Origin.SOURCE, is_private=is_private, over=over
            )
        except ApiError:
            meanwhile = self._state.registry.find_named(name)
            if meanwhile is None or (over is not None and meanwhile.adapter_id == over.adapter_id):
                raise
            return meanwhile
        self._keep(record)
        self._checked[name] = time.monotonic()
        return record

    async def _bring_again(self, record: AdapterRecord) -> AdapterRecord:
        """As a new generation; what a client has loaded is brought in the same revision."""
        if record.path.startswith(PRIVATE):
            await self._leave(record.name)
            message = (
                f"adapter {record.name!r} was damaged here; ask again, to have it fetched with your token"
            )
            raise unavailable(message)
        if record.origin is Origin.SOURCE:
            try:
                found = await self._find(record.name)
            except FetchError as error:
                raise not_given(record.name, error) from error
            return await self._bring_found(record.name, found, over=record)
        try:
            found = await self._looks.run(find_again, self.sources, record.name, record.path)
        except FetchError as error:
            message = f"adapter {record.name!r} is damaged here, and cannot be had again: {error}"
            raise ApiError(502, message, "BadGatewayError", "model") from error
        return await self._take(record.name, found, in_place=True, origin=record.origin, over=record)

    # --- new revisions ---

    def _refresh(self, name: str) -> None:
        """In the background, and not too often: requests are served from what is there meanwhile."""
        now, last = time.monotonic(), self._checked.get(name)
        if last is not None and now < last + self._config.source_refresh_s:
            return
        if self._num_refreshing >= MAX_REFRESHES:
            return
        self._checked[name] = now
        if self._may_ask(name, None):
            self._num_refreshing += 1
            self._background(self._look_again(name))

    async def _look_again(self, name: str) -> None:
        """A new revision is a new generation; running requests end on the old one."""
        try:
            record = self._state.registry.find_named(name)
            if record is None or record.origin is not Origin.SOURCE or record.path.startswith(PRIVATE):
                return
            found = await self._find(name)
            if found.where != record.path:
                await self._bring_found(name, found, over=record)
        except (AdapterError, ApiError, OSError) as error:
            logger.warning("adapter %s stays as it is: %s", name, error)
        finally:
            self._num_refreshing -= 1

    # --- the bound ---

    def _keep(self, record: AdapterRecord) -> None:
        """Counts it, and lets the least recently asked for go while all are too many bytes."""
        for name in self._held.keep(record, self._config.source_cache_bytes):
            logger.info("adapter %s leaves: adapters of sources would take more than the bound", name)
            self._background(self._leave(name))
        for name in self._checked.keys() - set(self._held):
            del self._checked[name]

    async def _leave(self, name: str) -> None:
        try:
            await self._admin.unload(name)
        except (ApiError, OSError) as error:
            logger.warning("adapter %s did not leave: %s", name, error)

    def _background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(log_failure)

    async def _find(self, name: str, kind: str | None = None, token: str | None = None) -> Found:
        return await self._looks.run(partial(find_adapter, self.sources, name, kind=kind, token=token))


def drop_unconfigured(registry: AdapterRegistry, config: ServerConfig) -> None:
    """At start: what came from sources that are not configured any more goes with them, and what another
    server was fetching when it was killed."""
    clear_fetches(registry.state_dir)
    sources = [parse_source(text) for text in config.adapter_source]
    for record in registry.list():
        if record.origin is Origin.SOURCE and not any(_is_of(each, record) for each in sources):
            logger.info("adapter %s goes: its source is not configured any more", record.name)
            registry.remove(record.name)


def _is_of(source: AdapterSource, record: AdapterRecord) -> bool:
    return source.kind == kind_of(record.path) and source.allows(record.name)
