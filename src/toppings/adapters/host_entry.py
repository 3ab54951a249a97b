"""One adapter in host memory, and the state it is in."""

import time
from enum import Enum

from toppings.adapters.arena import Bytes, HostArena
from toppings.adapters.errors import AdapterError
from toppings.adapters.layout import AdapterLayout

WANTED_S = 2.0
"""How long an entry is kept for those who asked for it and have not come for it yet."""


class EntryState(Enum):
    QUEUED = "queued"
    READING = "reading"
    READY = "ready"
    MOVING = "moving"  # by compaction: ready again in a moment
    FAILED = "failed"


class HostEntry:
    """One adapter in host memory. `layout` and offsets are there from READING on.

    `num_layers_ready` counts the layers that are read, first to last. Byte offsets are of the arena.
    """

    def __init__(self, adapter_id: int, arena: HostArena) -> None:
        self.adapter_id = adapter_id
        self.state = EntryState.QUEUED
        self.num_layers_ready = 0
        self.num_pins = 0
        self.was_fetched = False  # pinned at least once since it was read
        self.wanted_at = time.perf_counter()
        self.error: AdapterError | None = None
        self.read_ms = 0.0
        self.read_at: float | None = None  # when it got its room and the read began; time.perf_counter
        self.ready_at: float | None = None  # time.perf_counter
        self._arena = arena
        self._layout: AdapterLayout | None = None
        self.offsets: list[int] = []

    @property
    def layout(self) -> AdapterLayout:
        assert self._layout is not None
        return self._layout

    @property
    def has_room(self) -> bool:
        """It may be pinned and copied from, layer by layer as they become ready."""
        return self.state in (EntryState.READING, EntryState.READY)

    @property
    def is_ready(self) -> bool:
        return self.state is EntryState.READY

    @property
    def is_idle(self) -> bool:
        return self.state is EntryState.READY and self.num_pins == 0

    @property
    def is_wanted(self) -> bool:
        return not self.was_fetched and time.perf_counter() - self.wanted_at < WANTED_S

    def place(self, layout: AdapterLayout, offsets: list[int]) -> None:
        self._layout, self.offsets = layout, offsets
        self.state = EntryState.READING

    def sizes(self) -> list[int]:
        return [self.layout.layer_bytes(layer) for layer in range(self.layout.num_layers)]

    def layer_view(self, layer: int) -> Bytes:
        """uint8, the layer's block; stays valid while the entry is pinned."""
        start = self.offsets[layer]
        return self._arena.view[start : start + self.layout.layer_bytes(layer)]
