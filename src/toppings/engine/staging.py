"""A step's host arrays to the device in one copy, out of page-locked memory, the host not waiting for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

ALIGNMENT_BYTES = 16
_NUM_BUFFERS = 6  # a step sends three times at most; the next one's arrays are written while it copies
_SMALLEST_BUFFER = 1 << 16


def packed_bytes(arrays: Sequence[Array]) -> int:
    """What the arrays take side by side, each on a multiple of `ALIGNMENT_BYTES`."""
    return sum(_aligned(array.nbytes) for array in arrays)


def unpack(packed: Tensor, arrays: Sequence[Array]) -> list[Tensor]:
    """Views of `packed`, uint8, where `Staging.copy` has put arrays of these shapes."""
    tensors, start = [], 0
    for array in arrays:
        part = packed[start : start + array.nbytes]
        tensors.append(part.view(_TORCH_DTYPES[array.dtype.str]).view(array.shape))
        start += _aligned(array.nbytes)
    return tensors


class Staging:
    """For the thread that runs the engine, on its current stream. `cuda`: the `torch.cuda` module (tests give
    a fake), None where copies are over when they return."""

    def __init__(self, device: torch.device, cuda: Any) -> None:
        self.device = device
        self._buffers = [_Buffer(cuda, is_locked=device.type == "cuda") for _ in range(_NUM_BUFFERS)]
        self._turn = 0

    def bring(self, arrays: Sequence[Array]) -> list[Tensor]:
        """The arrays as tensors on the device."""
        target = torch.empty(packed_bytes(arrays), dtype=torch.uint8, device=self.device)
        self.copy(arrays, target)
        return unpack(target, arrays)

    def copy(self, arrays: Sequence[Array], target: Tensor) -> None:
        """Packs the arrays into the first bytes of `target`, uint8 on the device, in the order of the current
        stream."""
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        self._buffers[self._turn].send(arrays, target)


class _Buffer:
    """Page-locked memory, and the event after the last copy out of it."""

    def __init__(self, cuda: Any, *, is_locked: bool) -> None:
        self._cuda = cuda
        self._is_locked = is_locked
        self._allocate(_SMALLEST_BUFFER)
        self._copied: Any = None

    def _allocate(self, num_bytes: int) -> None:
        self._tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_locked)
        self._view: npt.NDArray[np.uint8] = self._tensor.numpy()

    def send(self, arrays: Sequence[Array], target: Tensor) -> None:
        if self._copied is not None:
            self._copied.synchronize()  # over long ago, unless a step failed before it waited for its tokens
        num_bytes = packed_bytes(arrays)
        if not num_bytes:
            return
        if num_bytes > len(self._view):
            self._allocate(2 * num_bytes)
        start = 0
        for array in arrays:
            self._view[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            start += _aligned(array.nbytes)
        target[:num_bytes].copy_(self._tensor[:num_bytes], non_blocking=True)
        if self._cuda is not None:
            self._copied = self._cuda.Event()
            self._copied.record()


_TORCH_DTYPES = {
    np.dtype(np.int32).str: torch.int32,
    np.dtype(np.int64).str: torch.int64,
    np.dtype(np.float32).str: torch.float32,
    np.dtype(np.float64).str: torch.float64,
}


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
