"""Host memory that other processes can map: an anonymous file, known by its descriptor."""

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


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
        self._unregister: Callable[[], None] | None = None

    @property
    def address(self) -> int:
        return int(self.view.ctypes.data)

    def move(self, source: int, target: int, num_bytes: int) -> None:
        """memmove within the arena: the ranges may overlap. Runs without the interpreter lock."""
        assert 0 <= target <= source <= source + num_bytes <= self.size_bytes
        ctypes.memmove(self.address + target, self.address + source, num_bytes)

    def lock_pages(self, cudart: Any = None) -> bool:
        """Registers the memory with CUDA, so that copies from it are asynchronous and fast.

        Returns False where there is no CUDA. `cudart`: `torch.cuda.cudart()`, or a test's fake.
        Raises RuntimeError where CUDA refuses.
        """
        cudart = cudart if cudart is not None else _cudart()
        if cudart is None:
            return False
        # Flag 1, cudaHostRegisterPortable: page-locked for every CUDA context of this process.
        error = int(cudart.cudaHostRegister(self.address, self.size_bytes, 1))
        if error:
            raise RuntimeError(f"cudaHostRegister of {self.size_bytes} bytes failed with error {error}")
        address = self.address
        self._unregister = lambda: cudart.cudaHostUnregister(address)
        return True

    def close(self) -> None:
        """Gives the memory back, or leaves that to the last view of it that somebody still holds."""
        if self._unregister is not None:
            self._unregister()
            self._unregister = None
        del self.view
        try:
            self._map.close()
        except BufferError:
            del self._map
        os.close(self.fd)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("toppings-adapters", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
