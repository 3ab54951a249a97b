"""What viewers are told: one reading twice a second for all of them, and none while there is nobody.

A reading is made of named sections. A viewer is sent those that differ from what it was sent before, all of
them at first. Nothing is queued: one that is slow gets the latest when it is ready for more. One that takes
nothing looks for long like one that does, since the system takes a while's events for it: so each stream ends
after some minutes, and whoever reads asks for the next one; and where places are taken, the oldest stream
of whoever has most gives way to who comes.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

logger = logging.getLogger(__name__)

PERIOD_S = 0.5
MAX_VIEWERS = 64
MAX_VIEWERS_EACH = 32
"""Of one tenant, or (administrators) from one address."""
LIFE_S = 300.0
"""After which a stream ends."""
FIRM_S = 10.0
"""For so long it does not give way."""
WHY_FULL = f"as many are looking at the dashboard as may at once; ask again in {FIRM_S:g} s"


@dataclass(eq=False, slots=True)
class Viewer:
    """Who is sent one stream, `whose` of them it is, and when it came."""

    whose: str
    came_at: float
    is_over: bool = False


class Feed:
    """`read` gives the sections, each something that JSON can say; names are the same every time.

    To be used from one event loop.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[Mapping[str, object]]],
        *,
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_readings = 0
        self._viewers: dict[Viewer, None] = {}  # the oldest first
        self._read, self._period_s, self.clock = read, period_s, clock
        self._sections: dict[str, bytes] = {}
        self._has_changed = asyncio.Event()
        self._producer: asyncio.Task[None] | None = None
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")
        self._is_closed = False

    @property
    def num_viewers(self) -> int:
        return len(self._viewers)

    def enter(self, whose: str) -> Viewer | None:
        """A place, that of an older stream if need be; None where none of those may go yet."""
        num_each = Counter(viewer.whose for viewer in self._viewers)
        is_too_many = num_each[whose] >= MAX_VIEWERS_EACH
        if is_too_many or self.num_viewers >= MAX_VIEWERS:
            from_whom = whose if is_too_many else num_each.most_common(1)[0][0]
            oldest = next(viewer for viewer in self._viewers if viewer.whose == from_whom)
            if self.clock() - oldest.came_at < FIRM_S:
                return None
            oldest.is_over = True
            del self._viewers[oldest]
        viewer = Viewer(whose, self.clock())
        self._viewers[viewer] = None
        return viewer

    @contextmanager
    def viewing(self, viewer: Viewer) -> Iterator[None]:
        """Its place, which was entered; to be held while it is sent `events`."""
        try:
            yield
        finally:
            self._viewers.pop(viewer, None)
            if not self._viewers and self._producer is not None:
                self._producer.cancel()
                self._producer = None

    async def events(self, viewer: Viewer) -> AsyncGenerator[bytes, None]:
        """Server-sent events, until the feed is closed or the stream is over; their data is a JSON object of
        sections."""
        await self._refresh()
        if self._producer is None and not self._is_closed:
            self._producer = asyncio.create_task(self._produce())
        sent: dict[str, bytes] = {}
        while True:
            has_changed, sections = self._has_changed, self._sections
            yield b"data: " + _joined({n: s for n, s in sections.items() if sent.get(n) is not s}) + b"\n\n"
            sent = sections
            if self._is_closed or viewer.is_over or self.clock() - viewer.came_at >= LIFE_S:
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
