"""The registry of one machine, which the front and all replicas there share, and a replica's view of it.

The front decides which adapters exist. What it names in a call is found here by name and content; on another
machine than the front's it is registered from its path when it is first named, or fetched from its source.
"""

import asyncio
import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from toppings.adapters.errors import AdapterError, AdapterNotFound, StateHeldError
from toppings.adapters.merges import MERGE_PATH
from toppings.adapters.recent_names import RecentNames
from toppings.adapters.registry import AdapterRecord, AdapterRegistry
from toppings.adapters.state_lock import StateLock
from toppings.bad_input import RequestError
from toppings.cluster.ray_serve.messages import AdapterRef
from toppings.config import Config, ConfigError, ServerConfig
from toppings.server.resolver import drop_unconfigured
from toppings.sources.adapters import FETCHED, AdapterSource, fetch_place, find_again, parse_source
from toppings.sources.fetch import Room
from toppings.sources.models import find_model

logger = logging.getLogger(__name__)

FRONT = "front.lock"


def open_node_registry(config: Config, *, is_front: bool) -> AdapterRegistry:
    """With the start-up directory's adapters registered, by the front on its machine and by the replicas on
    others; one process of a machine does that at a time.

    The processes share the state directory with each other and with nobody else: raises StateHeldError.
    """
    from toppings.engine.base import hold_state, open_registry

    lock = hold_state(config.engine, "toppings up", is_shared=True)
    registry = open_registry(config.engine, lock)
    engine = config.engine
    directory = config.server.adapters or find_model(engine.model, engine.state_dir).adapters
    with _registering(registry):
        front = _front_lock(registry)
        if front is None and is_front:
            registry.close()
            raise StateHeldError(
                f"the state directory {registry.state_dir} is in use by another `toppings up`; "
                "name another one with --state-dir"
            )
        if front is not None:
            registry.register_directory(directory or None).log()
            if is_front:
                drop_unconfigured(registry, config.server)
                registry.clean_up()
                registry.keep_open(front)
            else:
                front.close()
    logger.info("%d adapters are registered in %s", registry.count(), registry.state_dir)
    return registry


def _front_lock(registry: AdapterRegistry) -> StateLock | None:
    """None where a front of this machine has it: then adapters are its business."""
    try:
        return StateLock.take(registry.state_dir, "the front of toppings up", file=FRONT)
    except StateHeldError:
        return None


@contextmanager
def _registering(registry: AdapterRegistry) -> Iterator[None]:
    with _alone(registry.state_dir / "register.lock"):
        yield


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Engine(Protocol):
    """What is asked of an engine's client here."""

    async def remove_adapter(self, adapter_id: int) -> None: ...
    async def pin_adapter(self, adapter_id: int, is_pinned: bool) -> None: ...
    async def prefetch_adapter(self, adapter_id: int) -> None: ...


class ReplicaAdapters:
    """The front's generations by this machine's adapter ids; used from one event loop."""

    def __init__(self, registry: AdapterRegistry, engine: Engine, config: ServerConfig) -> None:
        self._registry, self._engine, self._config = registry, engine, config
        self._sources = list(_sources_here(config))
        self._ids: dict[int, int] = {}
        self._retired: dict[int, int] = {}
        self._names = RecentNames(registry)
        self._resolving: dict[int, asyncio.Task[int]] = {}

    async def resolve(self, ref: AdapterRef) -> int:
        """This machine's id of an adapter. Raises AdapterError where it is not here and cannot be had."""
        adapter_id = self._ids.get(ref.generation)
        if adapter_id is not None:
            return adapter_id
        task = self._resolving.get(ref.generation)
        if task is None:  # a fetch may take its time, and keeps back nobody who asks for another adapter
            task = self._resolving[ref.generation] = asyncio.create_task(self._resolve(ref))
            task.add_done_callback(lambda _: self._resolving.pop(ref.generation))
        return await asyncio.shield(task)

    async def _resolve(self, ref: AdapterRef) -> int:
        record = await asyncio.to_thread(self._find_or_register, ref)
        self._ids[ref.generation] = record.adapter_id
        if ref.is_pinned:
            await self._pin_quietly(record)
        return record.adapter_id

    def _find_or_register(self, ref: AdapterRef) -> AdapterRecord:
        if not ref.path.startswith("/"):
            return self._find_or_fetch(ref)
        with _registering(self._registry):
            found = self._find(ref)
            return found or self._register(ref, Path(ref.path))

    def _find(self, ref: AdapterRef) -> AdapterRecord | None:
        found = self._registry.find(ref.name, ref.digest)
        return found if found is not None and found.adapter_id not in self._retired.values() else None

    def _find_or_fetch(self, ref: AdapterRef) -> AdapterRecord:
        """Of the replicas of a machine, one fetches what came from a source; the others find it then."""
        if (found := self._find(ref)) is not None:
            return found
        if ref.path.startswith(MERGE_PATH):
            raise AdapterError(
                f"adapter {ref.name!r} is a merge, which was made on the front's machine and is not on this "
                "one; merge with PEFT and load what that saves, or keep the replicas on the front's machine"
            )
        fetched = self._registry.state_dir / FETCHED
        fetched.mkdir(exist_ok=True)
        lock = fetched / f"{ref.digest[:16]}.lock"
        with _alone(lock), fetch_place(self._registry.state_dir) as part:
            try:
                if (found := self._find(ref)) is not None:
                    return found
                room = Room(self._config.source_max_bytes, self._config.source_timeout_s)
                path = find_again(self._sources, ref.name, ref.path).bring(part, room)
                with _registering(self._registry):
                    return self._register(ref, path, ref.path)
            finally:
                lock.unlink(missing_ok=True)

    def _register(self, ref: AdapterRef, path: Path, source: str = "") -> AdapterRecord:
        logger.info("adapter %s is registered here from %s", ref.name, ref.path)
        return self._registry.register(ref.name, path, replace=True, digest=ref.digest, source=source)

    async def _pin_quietly(self, record: AdapterRecord) -> None:
        try:
            await self._engine.pin_adapter(record.adapter_id, True)
        except RequestError as error:
            logger.warning("adapter %s is not pinned: %s", record.name, error)

    async def pin(self, ref: AdapterRef, is_pinned: bool) -> None:
        """Raises AdapterError, or RequestError where the engine cannot pin it."""
        await self._engine.pin_adapter(await self.resolve(ref), is_pinned)

    async def prefetch(self, ref: AdapterRef) -> None:
        """Raises as `pin`."""
        await self._engine.prefetch_adapter(await self.resolve(ref))

    async def retire(self, ref: AdapterRef) -> None:
        """Returns when the generation's requests here have ended and its memory is free.

        Nothing happens where a newer generation of the same content has the same id here.
        """
        adapter_id = self._ids.pop(ref.generation, None)
        if adapter_id is None:
            adapter_id = await asyncio.to_thread(self._look_up, ref)
        if adapter_id is None or adapter_id in self._ids.values():
            return
        self._retired[ref.generation] = adapter_id
        await asyncio.to_thread(self._free_name, ref.name, adapter_id)
        await self._engine.remove_adapter(adapter_id)

    async def purge(self, ref: AdapterRef) -> None:
        """No replica uses it any more: its packed file may go."""
        adapter_id = self._retired.pop(ref.generation, None)
        if adapter_id is not None:
            await asyncio.to_thread(self._registry.purge, adapter_id)

    def name_of(self, adapter_id: int) -> str:
        """Also of a removed generation that still drains; "" where nothing is known of it."""
        return self._names.of(adapter_id) or ""

    def _look_up(self, ref: AdapterRef) -> int | None:
        """A generation that was never asked for here: on the front's machine its id is the front's."""
        try:
            record = self._registry.get_by_id(ref.generation)
            if (record.name, record.digest) == (ref.name, ref.digest):
                return record.adapter_id
        except AdapterNotFound:
            pass
        found = self._registry.find(ref.name, ref.digest)
        return None if found is None else found.adapter_id

    def _free_name(self, name: str, adapter_id: int) -> None:
        try:
            if self._registry.get(name).adapter_id == adapter_id:
                self._registry.remove(name)
        except AdapterNotFound:
            pass


def _sources_here(config: ServerConfig) -> Iterator[AdapterSource]:
    """A directory that only the front's machine has is none of this one's."""
    for text in config.adapter_source:
        with suppress(ConfigError):
            yield parse_source(text)


def explain(error: AdapterError | RequestError, replica_id: str) -> str:
    return f"replica {replica_id}: {error}"
