"""Shared memory between the engine and one worker process: a bounded ring of requests, rows in, results out.

    [ header | ring of request slots | input area | output area ]

The memory is a memfd: it has no name, and is gone when the last process that maps it has ended, however it
did.

Order of memory accesses. One side writes each word: the engine PUBLISHED and ACTIVE, the worker DONE and
READY. Words are aligned 8-byte integers, stored and loaded by single instructions (CPython's "q"
memoryview). What PUBLISHED or DONE announces must be visible before the number itself: x86-64 keeps stores
in order and loads in order, so nothing is needed there; elsewhere (Arm) `_fence` is a full barrier beside
each such store and load. No step relies on a store being visible before a later load of the same process: a
wake-up that could be lost that way is a byte in a pipe (see pool.py).

PUBLISHED may be written, and DONE waited for, by a device's stream (stream_exchange.py): for that,
the engine writes a request long before it is announced.
"""

import ctypes
import mmap
import os
import platform
import threading
from collections.abc import Sequence

LINE_BYTES = 64
SLOT_WORDS = 32
_WORD_BYTES = 8
_SLOT_BYTES = SLOT_WORDS * _WORD_BYTES

# Word indices in the header, one cache line for each writer.
_NUM_SLOTS, _INPUT_BYTES, _OUTPUT_BYTES = 0, 1, 2
_PUBLISHED, _ACTIVE = 8, 9
_DONE, _READY = 16, 17
_HEADER_BYTES = 3 * LINE_BYTES

_HAS_ORDERED_MEMORY = platform.machine() in ("x86_64", "AMD64")
_lock = threading.Lock()


def _fence() -> None:
    """A full memory barrier: nothing moves across two release-acquire pairs on one lock."""
    if not _HAS_ORDERED_MEMORY:
        for _ in range(2):
            with _lock:
                pass


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


class Channel:
    """Either end. Requests are numbered from 1; number n stands in ring slot n modulo the ring's length.

    The engine end calls `try_reserve`, then fills the input, then `post` and `announce`; the worker end
    `observe` and `finish`. A request's input and output stay untouched until the engine calls `recycle`.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, 0)
        self.buffer = memoryview(self._map)
        self._words = self.buffer[: len(self.buffer) // _WORD_BYTES * _WORD_BYTES].cast("q")
        self.num_slots = self._words[_NUM_SLOTS]
        self.input_start = _HEADER_BYTES + self.num_slots * _SLOT_BYTES
        self.output_start = self.input_start + self._words[_INPUT_BYTES]
        self._input_used = 0
        self._output_used = 0
        self._num_posted = 0

    @classmethod
    def create(cls, *, num_slots: int, input_bytes: int, output_bytes: int) -> "Channel":
        """A new one, whose `fd` a worker inherits. Sizes are rounded up to cache lines."""
        if num_slots < 1:
            raise ValueError(f"a channel of {num_slots} slots; it needs at least 1")
        input_bytes, output_bytes = aligned(input_bytes), aligned(output_bytes)
        fd = os.memfd_create("toppings-assist", os.MFD_CLOEXEC)
        os.ftruncate(fd, _HEADER_BYTES + num_slots * _SLOT_BYTES + input_bytes + output_bytes)
        header = num_slots.to_bytes(8, "little") + input_bytes.to_bytes(8, "little")
        os.pwrite(fd, header + output_bytes.to_bytes(8, "little"), 0)
        return cls(fd)

    # --- the engine's end ---

    @property
    def address(self) -> int:
        """Of the memory in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @property
    def published_address(self) -> int:
        return self.address + _PUBLISHED * _WORD_BYTES

    @property
    def done_address(self) -> int:
        return self.address + _DONE * _WORD_BYTES

    @property
    def is_drained(self) -> bool:
        return self.done == self._num_posted

    @property
    def num_free_slots(self) -> int:
        return self.num_slots - (self._num_posted - self.done)

    def recycle(self) -> None:
        """All results so far have been read: their room may be used again, once nothing is under way."""
        if self.is_drained:
            self.reuse_areas()

    def reuse_areas(self) -> None:
        """The next request's input and output start where the first one's did. For who makes sure in another
        way that nothing there is needed any more."""
        self._input_used = self._output_used = 0

    def try_reserve(self, input_bytes: int, output_bytes: int) -> tuple[int, int] | None:
        """Room for one request's (input, output): offsets in `buffer`. None where ring or areas are full."""
        if not self.num_free_slots:
            return None
        offsets = self.input_start + self._input_used, self.output_start + self._output_used
        if offsets[0] + input_bytes > self.output_start or offsets[1] + output_bytes > len(self.buffer):
            return None
        self._input_used += aligned(input_bytes)
        self._output_used += aligned(output_bytes)
        return offsets

    def post(self, request: Sequence[int]) -> int:
        """Writes down a request, whose room is reserved; returns its number, which is to be announced."""
        assert len(request) <= SLOT_WORDS
        self._num_posted += 1
        start = self._slot_start(self._num_posted)
        for i, word in enumerate(request):
            self._words[start + i] = word
        return self._num_posted

    def announce(self, number: int) -> None:
        """The input of this request and those before is there: they are the worker's now."""
        _fence()
        self._words[_PUBLISHED] = number

    @property
    def done(self) -> int:
        """Number of the last request that the worker is through with; its result is visible."""
        number = self._words[_DONE]
        _fence()
        return number

    @property
    def is_ready(self) -> bool:
        """The worker has started up."""
        return self._words[_READY] != 0

    def set_active(self, is_active: bool) -> None:
        """Whether the worker is to watch for requests without sleeping."""
        self._words[_ACTIVE] = is_active

    # --- the worker's end ---

    def mark_ready(self) -> None:
        self._words[_READY] = 1

    @property
    def is_active(self) -> bool:
        return self._words[_ACTIVE] != 0

    @property
    def has_request(self) -> bool:
        return self._words[_PUBLISHED] != self._words[_DONE]

    def observe(self) -> list[int]:
        """The next request's words; only when `has_request`."""
        _fence()
        start = self._slot_start(self._words[_DONE] + 1)
        return self._words[start : start + SLOT_WORDS].tolist()

    def finish(self) -> None:
        """The next request is done and its result is written."""
        number = self._words[_DONE] + 1
        _fence()
        self._words[_DONE] = number

    def _slot_start(self, number: int) -> int:
        return (_HEADER_BYTES + number % self.num_slots * _SLOT_BYTES) // _WORD_BYTES

    def close(self) -> None:
        """Closes the descriptor; the mapping lives as long as someone holds a view of it."""
        os.close(self.fd)
