"""Loading and unloading adapters while others are served; the routes only differ in how they say it."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from toppings.adapters.errors import (
    AdapterError,
    AdapterExists,
    AdapterNameReserved,
    AdapterNotFound,
    StateError,
    StateFullError,
)
from toppings.adapters.merges import Merge
from toppings.adapters.registry import AdapterRecord, Origin
from toppings.bad_input import RequestError
from toppings.engine.client import EngineDeadError
from toppings.server.errors import ApiError
from toppings.server.paths import AdapterRoots, not_configured
from toppings.server.state import ServerState
from toppings.sources.adapters import PRIVATE
from toppings.sources.models import find_model
from toppings.tenants.book import ADMIN
from toppings.tenants.refusals import denied
from toppings.tenants.tenant import Tenant
from toppings.vital import log_failure

logger = logging.getLogger(__name__)

T = TypeVar("T")
INVALID = "InvalidUserInput"
NUM_THREADS = 4
"""Of the registry's own: a disk that hangs, or a file that is locked, holds up none that tokenise."""


class AdapterAdmin:
    """Changes to what is registered, one registration at a time, packed beside the event loop.

    All raise ApiError, with the wording that controllers of vLLM look for, or StateError where the state
    directory cannot be written: then nothing has changed.
    """

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._lock = asyncio.Lock()
        self._refusal: tuple[float, StateError] | None = None
        self._drains: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(NUM_THREADS, "registry")
        self.roots = AdapterRoots(adapter_roots(state))

    async def load(
        self, name: str, path: str, *, in_place: bool = False, tenant: Tenant = ADMIN
    ) -> AdapterRecord:
        """Register a checkpoint; in place, its name's requests go to it from now on; the old one drains.

        Raises Refusal 403 for a place that is not the tenant's to load from.
        """
        self._state.check_open()
        if not name or not path:
            raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.", INVALID)
        try:
            locate = partial(self.roots.locate, name, path, tells_roots=tenant.is_admin)
            directory = await self._in_thread(locate)
        except ApiError:
            record = await self._load_from_source(name, path, in_place=in_place, tenant=tenant)
            if record is not None:
                return record
            if (reason := not_configured(path)) is None:
                raise
            message = f"Loading lora {name} failed: {reason}"
            raise ApiError(404, message, "NotFoundError", "lora_path") from None
        _check_place(tenant, str(directory), path)
        async with self._turn():
            make = partial(self._state.registry.register, name, directory, roots=self.roots.directories)
            return await self._register(name, str(directory), make, in_place=in_place, tenant=tenant)

    async def merge(
        self, name: str, make: Callable[[], Merge], *, in_place: bool = False, tenant: Tenant = ADMIN
    ) -> AdapterRecord:
        """Register the sum of adapters that the tenant may use; those of sources are fetched if need be.

        `make`: what is asked for, or AdapterError. Raises as `load`, and Refusal 403 for a part that is not
        the tenant's to use.
        """
        self._state.check_open()
        if not name:
            raise ApiError(400, "'lora_name' must be provided.", INVALID)
        with _told(name):
            merge = make()
            self._state.registry.check_free(name, replace=in_place)
        for part in merge.parts:
            await self._check_part(name, part.name)
        async with self._turn():
            make_merge, parts = (
                partial(self._state.registry.merge, name, merge),
                [p.name for p in merge.parts],
            )
            return await self._register(
                name, f"merge of {', '.join(parts)}", make_merge, in_place=in_place, tenant=tenant
            )

    async def _check_part(self, name: str, part: str) -> None:
        failure = f"Loading lora {name} failed: {part!r}"
        target = await self._state.find_target(part)
        if target.adapter_id is None:
            raise ApiError(400, f"{failure} is the base model; only adapters can be merged", INVALID)
        if self._state.registry.get_by_id(target.adapter_id).path.startswith(PRIVATE):
            message = f"{failure} is only for those whose own token may read it; it cannot be merged"
            raise ApiError(403, message, "PermissionDeniedError")

    async def register_found(
        self,
        name: str,
        directory: Path,
        root: Path,
        *,
        in_place: bool,
        origin: Origin,
        source: str,
        tenant: Tenant = ADMIN,
        over: AdapterRecord | None = None,
    ) -> AdapterRecord:
        """What was fetched from `source` into `directory`, which is not needed afterwards; no link of it may
        lead out of `root`. `over`: the only one whose name it may take."""
        make = partial(self._state.registry.register, name, directory, roots=[root], source=source, over=over)
        async with self._turn():
            return await self._register(
                name, source, make, in_place=in_place, origin=origin, fetched=directory, tenant=tenant
            )

    async def _load_from_source(
        self, name: str, path: str, *, in_place: bool, tenant: Tenant
    ) -> AdapterRecord | None:
        """None where `path` is none of the configured sources' places."""
        resolver = self._state.resolver
        if resolver is None or not resolver.has_place(path):
            return None
        _check_place(tenant, path, path)
        with _told(name):  # before anything is fetched for it
            self._state.registry.check_free(name, replace=in_place)
        return await resolver.load(name, path, in_place=in_place, tenant=tenant)

    async def unload(self, name: str) -> None:
        """Nobody finds `name` from now on; returns when its requests have ended and its memory is free."""
        if not name:
            message = "'lora_name' needs to be provided to unload a LoRA adapter."
            raise ApiError(400, message, INVALID)
        self.record(name)
        try:
            with self._state.audit.change("unload", adapter=name):
                record = await self._in_thread(self._state.registry.remove, name)
        except AdapterNotFound as error:  # somebody else was faster
            raise _not_found(name) from error
        await self._remove_generation(record)

    async def pin(self, name: str, is_pinned: bool) -> None:
        """Keep an adapter on the device, now and after a restart, or let it be evicted again."""
        async with self._turn():  # not while a reload gives the name to another generation
            record = self.record(name)
            with self._state.audit.change("pin" if is_pinned else "unpin", adapter=name):
                await self._pin(record, is_pinned)

    async def _pin(self, record: AdapterRecord, is_pinned: bool) -> None:
        registry, client, name = self._state.registry, self._state.client, record.name
        try:
            if is_pinned:
                await self._in_thread(registry.check_pin, name)
            await client.pin_adapter(record.adapter_id, is_pinned)
            try:
                await self._in_thread(registry.set_pinned, name, is_pinned)
            except BaseException:
                with suppress(RequestError, EngineDeadError):
                    await client.pin_adapter(record.adapter_id, record.is_pinned)
                raise
        except (RequestError, AdapterNotFound):
            self.record(name)  # it may have been unloaded meanwhile
            raise

    async def prefetch(self, name: str) -> None:
        """Have an adapter read into host memory before a request asks for it."""
        record = self.record(name)
        with self._state.audit.change("prefetch", adapter=name):
            await self._state.client.prefetch_adapter(record.adapter_id)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Who has waited while the state directory could not be written is told so at once: a queue of those
        who each try for themselves would be told after as many times that long."""
        came_at = time.monotonic()
        async with self._lock:
            if self._refusal is not None and self._refusal[0] >= came_at:
                raise StateError(str(self._refusal[1])) from self._refusal[1]
            try:
                yield
            except StateFullError:  # a smaller one may have room
                raise
            except StateError as error:
                self._refusal = (time.monotonic(), error)
                raise

    def record(self, name: str) -> AdapterRecord:
        """Raises ApiError 404 for a name that is not registered."""
        record = self._state.registry.find_named(name)
        if record is None:
            raise _not_found(name)
        return record

    async def _register(
        self,
        name: str,
        path: str,
        make: Callable[..., AdapterRecord],
        *,
        in_place: bool,
        origin: Origin = Origin.HTTP,
        fetched: Path | None = None,
        tenant: Tenant = ADMIN,
    ) -> AdapterRecord:
        """`make`: one of the registry's ways to make an adapter, which runs in a thread; `path`: what it is
        made of, for the audit log."""
        old = self._state.registry.find_named(name) if in_place else None
        told = self._state.audit.change("load", adapter=name, path=path, origin=str(origin))
        with told, _told(name, fetched):
            max_bytes = await self._in_thread(self._bytes_left, tenant, name)
            record = await self._in_thread(make, replace=in_place, origin=origin, max_bytes=max_bytes)
        if record.is_pinned:
            await self._pass_pin(old, record)
        if old is not None and old.adapter_id != record.adapter_id:
            self._drain(old)
        return record

    def _bytes_left(self, tenant: Tenant, name: str) -> int | None:
        """Of what the tenant's own adapters may take, for one of this name; None where there is no bound."""
        if not tenant.adapter_bytes:
            return None
        others = (
            r.num_bytes for r in self._state.registry.list() if r.name != name and tenant.may_load(r.name)
        )
        return max(0, tenant.adapter_bytes - sum(others))

    async def _pass_pin(self, old: AdapterRecord | None, new: AdapterRecord) -> None:
        """The old generation's room on the device is the new one's to have. An engine that has gone needs no
        telling: the next one reads in the registry what is pinned."""
        client = self._state.client
        if old is not None:
            with suppress(RequestError, EngineDeadError):
                await client.pin_adapter(old.adapter_id, False)
        try:
            with suppress(EngineDeadError):
                await client.pin_adapter(new.adapter_id, True)
        except RequestError as error:
            logger.warning("adapter %s is no longer pinned: %s", new.name, error)
            await self._in_thread(self._state.registry.set_pinned, new.name, False)

    def _drain(self, old: AdapterRecord) -> None:
        """In the background: the reload is answered while the old generation's requests still run."""
        task = asyncio.create_task(self._remove_quietly(old))
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)
        task.add_done_callback(log_failure)

    async def _remove_quietly(self, old: AdapterRecord) -> None:
        try:
            await self._remove_generation(old)
        except (EngineDeadError, ValueError) as error:
            logger.warning("the replaced generation of adapter %s was not removed: %s", old.name, error)

    async def _remove_generation(self, record: AdapterRecord) -> None:
        """Its requests end, its memory is freed, then its packed file goes: if need be, at the next start."""
        await self._state.client.remove_adapter(record.adapter_id)
        try:
            await self._in_thread(self._state.registry.purge, record.adapter_id)
        except StateError as error:
            logger.warning("the files of adapter %s stay until the next start: %s", record.name, error)

    async def _in_thread(self, function: Callable[..., T], *args: object, **kwargs: object) -> T:
        """What may wait for a disk."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(function, *args, **kwargs))


def adapter_roots(state: ServerState) -> list[Path]:
    """Where adapters may be loaded from: the configured roots, the start-up directory, the built-in ones."""
    server = state.config.server
    roots = [Path(root) for root in server.adapter_roots]
    for root in roots:
        if not root.is_dir():
            logger.warning("adapter_roots: there is no directory %s yet", root)
    if server.adapters:
        roots.append(Path(server.adapters))
    engine = state.config.engine
    if (builtin := find_model(engine.model, engine.state_dir).adapters) is not None:
        roots.append(builtin)
    return roots


@contextmanager
def _told(name: str, fetched: Path | None = None) -> Iterator[None]:
    """Why it is not registered, as controllers of vLLM know it; not where it was fetched to."""
    try:
        yield
    except AdapterExists as error:
        message = (
            f"The lora adapter '{name}' has already been loaded. "
            "If you want to load the adapter in place, set 'load_inplace' to True."
        )
        raise ApiError(400, message, INVALID) from error
    except AdapterNameReserved as error:
        message = f"The lora adapter '{name}' conflicts with a served base model."
        raise ApiError(400, message, INVALID) from error
    except AdapterError as error:
        told = str(error) if fetched is None else str(error).replace(str(fetched), name)
        raise ApiError(400, f"Loading lora {name} failed: {told}", INVALID) from error


def _check_place(tenant: Tenant, place: str, told: str) -> None:
    if not tenant.may_load_from(place):
        problem = f"tenant `{tenant.name}` may not load adapters from `{told}`"
        raise denied(f"{problem}: no pattern of its load_from fits")


def _not_found(name: str) -> ApiError:
    return ApiError(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
