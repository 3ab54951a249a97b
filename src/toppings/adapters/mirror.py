"""The device pools of a split model: the lead decides, and the followers repeat what it did.

Every part's adapters have the same layout, so that the same calls, in the same order, give every pool the
same blocks and tables. All processes map the lead's arena. A follower's load begins when the adapter is
wholly in host memory, which is before a request for it is admitted; the lead holds source and blocks in place
until all followers have said that theirs has landed.
"""

import threading
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from toppings.adapters.arena import Bytes, HostArena
from toppings.adapters.cuda_loader import CudaLoader
from toppings.adapters.device_pool import DevicePool
from toppings.adapters.errors import AdapterError
from toppings.adapters.host_entry import HostEntry
from toppings.adapters.layout import AdapterLayout, BaseShapes, Extras, LoadOrder
from toppings.adapters.loader import CpuLoader, Loader, LoadHandle, LoadSource
from toppings.adapters.parts import AdapterParts, PartOfEntry


class Place(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """`DevicePool.try_place` was called; ranks by layer and module, and extras by layer."""

    ranks: list[tuple[int, ...]]
    extras: list[Extras]


class MarkLoaded(msgspec.Struct, frozen=True, tag=True, array_like=True):
    slot: int


class Free(msgspec.Struct, frozen=True, tag=True, array_like=True):
    slot: int


class Load(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Fill a slot; `host_offsets`, in bytes of the arena, of every part's blocks by layer."""

    load_id: int
    slot: int
    host_offsets: list[list[int]]
    device_offsets: list[int]  # in bytes


PoolCommand = Place | MarkLoaded | Free | Load
Send = Callable[[PoolCommand], None]


class LeadPool(DevicePool):
    """A pool whose followers hear of every call that may have changed it."""

    def __init__(self, send: Send, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._send = send
        self.newest_slot = -1
        """The one placed last: its load is the next to begin."""

    def try_place(self, layout: AdapterLayout) -> int | None:
        has_room = bool(self.num_free_slots) and layout.num_bytes <= self.free_bytes
        slot = super().try_place(layout)
        if has_room:  # even where that failed, blocks may have moved
            layers = layout.layers
            self._send(Place([each.ranks for each in layers], [each.extras for each in layers]))
        if slot is not None:
            self.newest_slot = slot
        return slot

    def mark_loaded(self, slot: int) -> None:
        super().mark_loaded(slot)
        self._send(MarkLoaded(slot))

    def free(self, slot: int) -> None:
        super().free(slot)
        self._send(Free(slot))


class LeadLoading:
    """Which loads the followers do as well, and which of them are over; mixed into the lead's loader.

    `take_landed` gives the ids of loads, each once for every follower that has it in place.
    """

    def __init__(
        self, pool: LeadPool, parts: AdapterParts, send: Send, take_landed: Callable[[], list[int]]
    ) -> None:
        self.parts = parts
        self._pool = pool
        self._send = send
        self._take_landed = take_landed
        self._next_id = 0
        self._lock = threading.Lock()
        self._unsent: list[tuple[Load, PartOfEntry]] = []
        self._ids: dict[LoadHandle, int] = {}
        self._num_missing: dict[int, int] = {}  # followers, by load id

    def begin(self, handle: LoadHandle, source: PartOfEntry, offsets_bytes: list[int]) -> None:
        hosts = [source.offsets_of(part) for part in range(self.parts.count)]
        load = Load(self._next_id, self._pool.newest_slot, hosts, offsets_bytes)
        self._next_id += 1
        self._ids[handle] = load.load_id
        self._num_missing[load.load_id] = self.parts.count - 1
        with self._lock:
            self._unsent.append((load, source))
        self.send_ready()

    def send_ready(self) -> None:
        """Called by the thread that reads, too."""
        with self._lock:
            unsent, self._unsent = self._unsent, []
            for load, source in unsent:
                if source.num_layers_ready == source.layout.num_layers:
                    self._send(load)
                elif source.error is None:
                    self._unsent.append((load, source))

    def is_over(self, handle: LoadHandle) -> bool:
        load_id = self._ids.get(handle)
        if load_id is None:
            return True
        for landed_id in self._take_landed():
            self._num_missing[landed_id] -= 1
        if self._num_missing[load_id]:
            return False
        del self._num_missing[load_id], self._ids[handle]
        return True


class _LeadLoader(Loader):
    """The part of a loader that both devices' share."""

    leading: LeadLoading

    def part_of(self, entry: LoadSource) -> LoadSource:
        assert isinstance(entry, HostEntry)
        return PartOfEntry(entry, self.leading.parts, 0)

    def start(
        self, source: LoadSource, offsets_bytes: list[int], order: LoadOrder | None = None
    ) -> LoadHandle:
        handle = super().start(source, offsets_bytes, order)
        if isinstance(source, PartOfEntry):
            self.leading.begin(handle, source, offsets_bytes)
        return handle

    def is_over(self, handle: LoadHandle) -> bool:
        return handle.done and self.leading.is_over(handle)

    def notify(self) -> None:
        super().notify()
        self.leading.send_ready()


class LeadCpuLoader(_LeadLoader, CpuLoader):
    def __init__(self, leading: LeadLoading, arena: torch.Tensor, *, link_gbps: float) -> None:
        self.leading = leading
        super().__init__(arena, link_gbps=link_gbps)


class LeadCudaLoader(_LeadLoader, CudaLoader):
    def __init__(self, leading: LeadLoading, arena: torch.Tensor) -> None:
        self.leading = leading
        super().__init__(arena)


class Lead:
    """What the adapter manager of a split model's lead does otherwise than one that is alone."""

    def __init__(self, parts: AdapterParts, send: Send, take_landed: Callable[[], list[int]]) -> None:
        self.parts = parts
        self._send = send
        self._take_landed = take_landed

    def make_pool(self, *args: Any, **kwargs: Any) -> DevicePool:
        return LeadPool(self._send, *args, **kwargs)

    def make_loader(self, pool: DevicePool, device: str, link_gbps: float) -> Loader:
        assert isinstance(pool, LeadPool)
        leading = LeadLoading(pool, self.parts, self._send, self._take_landed)
        if device == "cuda":
            return LeadCudaLoader(leading, pool.arena)
        return LeadCpuLoader(leading, pool.arena, link_gbps=link_gbps)


class MappedSource:
    """A follower's part of an adapter in the lead's arena: a `LoadSource`, whole from the start."""

    def __init__(self, load: Load, layout: AdapterLayout, arena: HostArena, part: int) -> None:
        self.adapter_id = load.load_id
        self.layout = layout
        self.num_layers_ready = layout.num_layers
        self.error: AdapterError | None = None
        self._arena = arena
        self._offsets = load.host_offsets[part]

    def layer_view(self, layer: int) -> Bytes:
        start = self._offsets[layer]
        return self._arena.view[start : start + self.layout.layer_bytes(layer)]


class FollowerAdapters:
    """The manager's part on a follower, as its model runner sees it: adapters go by their slots."""

    def __init__(
        self, pool: DevicePool, loader: Loader, arena: HostArena, shapes: BaseShapes, dtype: str, part: int
    ) -> None:
        self.pool = pool
        self._loader = loader
        self._arena = arena
        self._shapes = shapes
        self._dtype = dtype
        self._part = part
        self._layouts: dict[int, AdapterLayout] = {}
        self._loads: dict[int, LoadHandle] = {}  # by slot
        self._pending: dict[int, LoadHandle] = {}  # by load id

    @property
    def is_loading(self) -> bool:
        return bool(self._pending)

    def slot_of(self, slot: int) -> int:
        return slot

    def load_of(self, slot: int) -> LoadHandle | None:
        load = self._loads.get(slot)
        return None if load is None or load.done else load

    def obey(self, command: PoolCommand) -> None:
        match command:
            case Place():
                layout = AdapterLayout.build(command.ranks, self._shapes, self._dtype, command.extras)
                if (slot := self.pool.try_place(layout)) is not None:
                    self._layouts[slot] = layout
            case MarkLoaded():
                self.pool.mark_loaded(command.slot)
                self._loads.pop(command.slot, None)
            case Free():
                self.pool.free(command.slot)
                self._loads.pop(command.slot, None)
            case Load():
                self._load(command)

    def _load(self, load: Load) -> None:
        layout, item_bytes = self._layouts[load.slot], self.pool.arena.itemsize
        offsets = [self.pool.layer_offset(load.slot, i) * item_bytes for i in range(layout.num_layers)]
        assert offsets == load.device_offsets, "the pool does not follow the lead's"
        source = MappedSource(load, layout, self._arena, self._part)
        handle = self._loader.start(source, offsets)
        self._loads[load.slot] = self._pending[load.load_id] = handle

    def take_landed(self) -> list[int]:
        """Ids of loads that are in place, each once. Raises AdapterError where one failed."""
        for handle in self._pending.values():
            if handle.error is not None:
                raise handle.error
        landed = [load_id for load_id, handle in self._pending.items() if handle.done]
        for load_id in landed:
            del self._pending[load_id]
        return landed
