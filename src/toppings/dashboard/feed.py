"""What viewers are told: one reading twice a second for all of them, and none while there is nobody.

A reading is made of named sections. A viewer is sent those that differ from what it was sent before, all of
them at first. Nothing is queued: one that is slow gets the latest when it is ready for more, and one
that takes nothing is dropped as any client that leaves its answer unread.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

import msgspec

logger = logging.getLogger(__name__)

PERIOD_S = 0.5
MAX_VIEWERS = 64
WHY_FULL = f"{MAX_VIEWERS} are looking at the dashboard already; no more may at once"


class Feed:
    """`read` gives the sections, each something that JSON can say; names are the same every time.

    To be used from one event loop.
    """

    def __init__(
        self, read: Callable[[], Awaitable[Mapping[str, object]]], *, period_s: float = PERIOD_S
    ) -> None:
        self.num_viewers = 0
        self.num_readings = 0
        self._read, self._period_s = read, period_s
        self._sections: dict[str, bytes] = {}
        self._has_changed = asyncio.Event()
        self._producer: asyncio.Task[None] | None = None
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")
        self._is_closed = False

    @property
    def is_full(self) -> bool:
        return self.num_viewers >= MAX_VIEWERS

    @contextmanager
    def viewing(self) -> Iterator[None]:
        """A viewer's place, to be held while it is sent `events`; to be taken while it is not full."""
        self.num_viewers += 1
        try:
            yield
        finally:
            self.num_viewers -= 1
            if not self.num_viewers and self._producer is not None:
                self._producer.cancel()
                self._producer = None

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, until the feed is closed; their data is a JSON object of sections."""
        await self._refresh()
        if self._producer is None and not self._is_closed:
            self._producer = asyncio.create_task(self._produce())
        sent: dict[str, bytes] = {}
        while True:
            has_changed, sections = self._has_changed, self._sections
            yield b"data: " + _joined({n: s for n, s in sections.items() if sent.get(n) is not s}) + b"\n\n"
            sent = sections
            if self._is_closed:
                return
            await has_changed.wait()

    async def latest(self) -> bytes:
        """All sections as one JSON object, no older than a period."""
        await self._refresh()
        return _joined(self._sections)

    def close(self) -> None:
        """Every viewer's events end."""
        self._is_closed = True
        self._tell()
        if self._producer is not None:
            self._producer.cancel()
            self._producer = None

    async def _produce(self) -> None:
        while True:
            await asyncio.sleep(self._period_s)
            try:
                await self._refresh()
            except Exception:
                logger.exception("the dashboard cannot be told how things are; it is tried again")

    async def _refresh(self) -> None:
        async with self._reading:
            if time.monotonic() - self._read_at < self._period_s / 2:
                return
            sections = await self._read()
            self._read_at = time.monotonic()
            self.num_readings += 1
            encoded = {name: msgspec.json.encode(section) for name, section in sections.items()}
            known = self._sections
            # What has not changed stays the same object: that is how viewers see what is new to them.
            self._sections = {n: known[n] if known.get(n) == s else s for n, s in encoded.items()}
            self._tell()

    def _tell(self) -> None:
        self._has_changed.set()
        self._has_changed = asyncio.Event()


def _joined(sections: Mapping[str, bytes]) -> bytes:
    return b"{" + b",".join(b'"%s":%s' % (name.encode(), text) for name, text in sections.items()) + b"}"
