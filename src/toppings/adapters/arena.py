"""Host memory that other processes can map: an anonymous file, known by its descriptor."""

import ctypes
import logging
import mmap
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

PIECE_BYTES = 1 << 28
"""Memory is page-locked in pieces of this size. No copy to a device may go over the border of two."""
_POPULATE_BYTES, _POPULATE_THREADS = 1 << 25, 8
_MADV_POPULATE_WRITE = 23

logger = logging.getLogger(__name__)


class HostArena:
    """`size_bytes` of shared memory, whose pages are only taken as they are written.

    `fd` reaches only a process that it is passed to; the memory is gone with the last one that maps it.
    """

    def __init__(self, size_bytes: int, fd: int | None = None) -> None:
        """`fd`: of another process's arena, to be mapped as well and owned from now on."""
        self.size_bytes = size_bytes
        if fd is None:
            fd = _anonymous_file()
            os.ftruncate(fd, size_bytes)
        self.fd = fd
        self._map = mmap.mmap(self.fd, size_bytes)
        self.view: Bytes = np.frombuffer(self._map, np.uint8)
        self._cudart: Any = None
        self._locked: set[tuple[int, int]] = set()
        self._is_refused = False

    @property
    def address(self) -> int:
        return int(self.view.ctypes.data)

    def move(self, source: int, target: int, num_bytes: int) -> None:
        """memmove within the arena: the ranges may overlap. Runs without the interpreter lock."""
        assert 0 <= target <= source <= source + num_bytes <= self.size_bytes
        ctypes.memmove(self.address + target, self.address + source, num_bytes)

    def lock_pages(self, cudart: Any = None) -> bool:
        """From now on memory is registered with CUDA before it is used, so that copies from it are
        asynchronous and fast; its first `PIECE_BYTES` at once.

        Returns False where there is no CUDA. `cudart`: `torch.cuda.cudart()`, or a test's fake.
        Raises RuntimeError where CUDA refuses.
        """
        self._cudart = cudart if cudart is not None else _cudart()
        if self._cudart is None:
            return False
        for piece in self._pieces[:2]:  # the first one ends at a border, and may be short
            self._lock(piece)
        return True

    def use(self, offset: int, num_bytes: int) -> None:
        """To be called before bytes are written for the first time: registers the pieces they stand in.

        Where CUDA refuses to, they stay as they are: copies from them are slower, and as right.
        """
        if self._cudart is None or not num_bytes:
            return
        for piece in self._pieces[self._piece_of(offset) : self._piece_of(offset + num_bytes - 1) + 1]:
            if piece not in self._locked and not self._is_refused:
                try:
                    self._lock(piece)
                except RuntimeError as error:
                    self._is_refused = True
                    logger.warning("adapters on the host are copied from pageable memory: %s", error)

    def use_all(self) -> None:
        """`use` of the whole."""
        self.use(0, self.size_bytes)

    @property
    def _pieces(self) -> list[tuple[int, int]]:
        """(offset, bytes) of each piece; borders are at multiples of `PIECE_BYTES` of addresses."""
        borders = range(PIECE_BYTES - self.address % PIECE_BYTES, self.size_bytes, PIECE_BYTES)
        edges = [0, *borders, self.size_bytes]
        return [(low, high - low) for low, high in pairwise(edges)]

    def _piece_of(self, offset: int) -> int:
        return (self.address + offset) // PIECE_BYTES - self.address // PIECE_BYTES

    def _lock(self, piece: tuple[int, int]) -> None:
        offset, num_bytes = piece
        _populate(self.address + offset, num_bytes)
        # Flag 1, cudaHostRegisterPortable: page-locked for every CUDA context of this process.
        error = int(self._cudart.cudaHostRegister(self.address + offset, num_bytes, 1))
        if error:
            raise RuntimeError(f"cudaHostRegister of {num_bytes} bytes failed with error {error}")
        self._locked.add(piece)

    def close(self) -> None:
        """Gives the memory back, or leaves that to the last view of it that somebody still holds."""
        for offset, _ in self._locked:
            self._cudart.cudaHostUnregister(self.address + offset)
        self._locked.clear()
        del self.view
        try:
            self._map.close()
        except BufferError:
            del self._map
        os.close(self.fd)


def within_pieces(view: Bytes) -> Iterator[tuple[int, int]]:
    """[start, stop) of the parts of `view`, memory of an arena, each of which is within one piece."""
    address, start = int(view.ctypes.data), 0
    while start < len(view):
        stop = min(len(view), start + PIECE_BYTES - (address + start) % PIECE_BYTES)
        yield start, stop
        start = stop


def _populate(address: int, num_bytes: int) -> None:
    """Takes the pages, by several threads: zeroing them is most of what page-locking fresh memory costs.
    Where the kernel cannot (before Linux 5.14), they are taken one by one when they are locked."""
    libc = ctypes.CDLL(None)
    page = mmap.PAGESIZE
    low, high = address // page * page, -(-(address + num_bytes) // page) * page

    def take(start: int) -> None:
        size = ctypes.c_size_t(min(_POPULATE_BYTES, high - start))
        libc.madvise(ctypes.c_void_p(start), size, _MADV_POPULATE_WRITE)

    with ThreadPoolExecutor(_POPULATE_THREADS) as threads:
        list(threads.map(take, range(low, high, _POPULATE_BYTES)))


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("toppings-adapters", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
