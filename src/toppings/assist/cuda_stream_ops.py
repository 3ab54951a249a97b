"""`StreamOps` of CUDA's driver: stream memory operations on page-locked host memory. Not yet run on a GPU.

A write makes all that precedes it in the stream visible first (CUDA driver API, cuStreamWriteValue64 without
NO_MEMORY_BARRIER); a wait holds back what follows it in the stream, and what the worker wrote before DONE is
in memory by then (channel.py).
"""

import ctypes
import importlib
import mmap
import time
from collections.abc import Callable
from typing import Any

import torch

from toppings.assist.stream_exchange import StreamOps

SELF_TEST_S = 1.0
_HELD: list[mmap.mmap] = []  # what a stream that hangs may still read

_MAPPED = 0x1 | 0x2  # CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP


def unavailable_reason(device_index: int = 0) -> str:
    """Why there are no stream memory operations here; empty where there are."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as missing:
        return f"cuda.bindings cannot be imported ({missing}): pip install cuda-bindings"
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
    try:
        call(driver, "cuInit", 0)
        (device,) = call(driver, "cuDeviceGet", device_index)
        (is_there,) = call(driver, "cuDeviceGetAttribute", attribute, device)
    except RuntimeError as error:
        return f"the CUDA driver does not tell what it can do: {error}"
    return "" if is_there else "the GPU cannot wait for 8-byte words in memory"


def failure_reason() -> str:
    """Why those that are there do not work, as in a sandbox that maps no host memory; empty where they do."""
    cuda: Any = torch.cuda
    with cuda.stream(cuda.Stream()):  # one that hangs holds up nobody
        return self_test(CudaStreamOps())


def self_test(ops: StreamOps, timeout_s: float = SELF_TEST_S) -> str:
    """Why writes and waits of the current stream do not work; empty where they do."""
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    words = (ctypes.c_int64 * 2).from_buffer(memory)
    written, awaited = ctypes.addressof(words), ctypes.addressof(words) + 8
    try:
        ops.lock(written, mmap.PAGESIZE)
        ops.write(written, 7)
        ops.wait(awaited, 5)
        is_over = ops.mark()
        has_waited = not is_over()
        words[1] = 5
        stop_at = time.monotonic() + timeout_s
        while not is_over():
            if time.monotonic() > stop_at:
                _HELD.append(memory)
                return f"a stream's wait does not end within {timeout_s:g} s"
        ops.unlock(written)
    except RuntimeError as error:
        return f"stream memory operations fail: {error}"
    if not has_waited:
        return "a stream does not wait for a word in the host's memory"
    return "" if words[0] == 7 else "a stream's write does not reach the host's memory"


def call(driver: Any, name: str, *arguments: Any) -> tuple[Any, ...]:
    """What a driver function returns beside its status. Raises RuntimeError."""
    status, *results = getattr(driver, name)(*arguments)
    if status:
        raise RuntimeError(f"{name} failed: {status.name}")
    return tuple(results)


class CudaStreamOps:
    """For the thread that runs the engine, on torch's current stream."""

    def __init__(self) -> None:
        self._driver: Any = importlib.import_module("cuda.bindings.driver")
        self._on_device: dict[int, tuple[int, int]] = {}  # by address: bytes, the device's address

    def lock(self, address: int, num_bytes: int) -> None:
        self._call("cuMemHostRegister", address, num_bytes, _MAPPED)
        (pointer,) = self._call("cuMemHostGetDevicePointer", address, 0)
        self._on_device[address] = num_bytes, int(pointer)

    def unlock(self, address: int) -> None:
        self._call("cuMemHostUnregister", address)
        del self._on_device[address]

    def write(self, address: int, value: int) -> None:
        flags = self._driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT
        self._call("cuStreamWriteValue64", _stream(), self._locate(address), value, int(flags))

    def wait(self, address: int, value: int) -> None:
        flags = self._driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        self._call("cuStreamWaitValue64", _stream(), self._locate(address), value, int(flags))

    def mark(self) -> Callable[[], bool]:
        cuda: Any = torch.cuda
        event = cuda.Event()
        event.record()
        return lambda: bool(event.query())

    def _locate(self, address: int) -> int:
        for start, (num_bytes, pointer) in self._on_device.items():
            if start <= address < start + num_bytes:
                return pointer + address - start
        raise KeyError(f"address {address:#x} is not page-locked")

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        return call(self._driver, name, *arguments)


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)
