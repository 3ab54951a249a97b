"""Loading and unloading adapters while others are served; the routes only differ in how they say it."""

import asyncio
import logging
from pathlib import Path

from toppings.adapters.errors import AdapterError, AdapterExists, AdapterNotFound
from toppings.adapters.registry import AdapterRecord
from toppings.demo import demo_adapters_dir
from toppings.engine.client import EngineDeadError
from toppings.server.errors import ApiError
from toppings.server.paths import AdapterRoots
from toppings.server.state import ServerState
from toppings.vital import log_failure

logger = logging.getLogger(__name__)

INVALID = "InvalidUserInput"


class AdapterAdmin:
    """Changes to what is registered, one registration at a time, packed beside the event loop."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._lock = asyncio.Lock()
        self._drains: set[asyncio.Task[None]] = set()
        self.roots = AdapterRoots(adapter_roots(state))

    async def load(self, name: str, path: str, *, in_place: bool = False) -> AdapterRecord:
        """Register a checkpoint; in place, its name's requests go to it from now on and the old one drains.

        Raises ApiError with the wording that controllers of vLLM look for.
        """
        state = self._state
        state.check_open()
        if not name or not path:
            raise ApiError(400, "Both 'lora_name' and 'lora_path' must be provided.", INVALID)
        if name == state.base_name:
            raise ApiError(400, f"The lora adapter '{name}' conflicts with a served base model.", INVALID)
        directory = self.roots.locate(name, path)
        async with self._lock:
            return await self._register(name, directory, in_place=in_place)

    async def unload(self, name: str) -> None:
        """Nobody finds `name` from now on; returns when its requests have ended and its memory is free."""
        state = self._state
        if not name:
            message = "'lora_name' needs to be provided to unload a LoRA adapter."
            raise ApiError(400, message, INVALID)
        self.record(name)
        record = await asyncio.to_thread(state.registry.remove, name)
        await self._remove_generation(record)

    async def pin(self, name: str, is_pinned: bool) -> None:
        """Keep an adapter on the device, now and after a restart, or let it be evicted again."""
        record = self.record(name)
        await self._state.client.pin_adapter(record.adapter_id, is_pinned)
        await asyncio.to_thread(self._state.registry.set_pinned, name, is_pinned)

    def record(self, name: str) -> AdapterRecord:
        """Raises ApiError 404 for a name that is not registered."""
        try:
            return self._state.registry.get(name)
        except AdapterNotFound as error:
            message = f"The lora adapter '{name}' cannot be found."
            raise ApiError(404, message, "NotFoundError") from error

    async def _register(self, name: str, directory: Path, *, in_place: bool) -> AdapterRecord:
        registry = self._state.registry
        old = _find(self._state, name) if in_place else None
        try:
            record = await asyncio.to_thread(registry.register, name, directory, replace=in_place)
        except AdapterExists as error:
            message = (
                f"The lora adapter '{name}' has already been loaded. "
                "If you want to load the adapter in place, set 'load_inplace' to True."
            )
            raise ApiError(400, message, INVALID) from error
        except AdapterError as error:
            raise ApiError(400, f"Loading lora {name} failed: {error}", INVALID) from error
        if old is not None and old.adapter_id != record.adapter_id:
            self._drain(old)
        return record

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
        """Its requests end, its memory is freed, then its packed file goes."""
        await self._state.client.remove_adapter(record.adapter_id)
        await asyncio.to_thread(self._state.registry.purge, record.adapter_id)


def adapter_roots(state: ServerState) -> list[Path]:
    """Where adapters may be loaded from: the configured roots, the start-up directory, else the demo's."""
    server = state.config.server
    roots = [Path(root) for root in server.adapter_roots]
    if server.adapters:
        roots.append(Path(server.adapters))
    if not state.config.engine.model:
        roots.append(demo_adapters_dir())
    return roots


def _find(state: ServerState, name: str) -> AdapterRecord | None:
    try:
        return state.registry.get(name)
    except AdapterNotFound:
        return None
