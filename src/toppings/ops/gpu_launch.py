"""What the launches of Triton kernels share."""

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_ELEMENTS_PER_WARP = 512
ALIGNMENT_BYTES = 16
"""Every A and B must start on a multiple of this: the sizes of all targeted modules must be multiples of
it."""
MULTIPROCESSORS_WITHOUT_GPU = 1
"""So that in the interpreter a program has more than one tile to do."""
CAPABILITY_WITHOUT_GPU = 80
"""Compute capability that kernels are chosen for where there is no GPU: 80 for 8.0."""
_FIRST_WITH_EARLY_LAUNCH = 90
_CHUNK_SIZES = (64, 1024)

Grid = tuple[int, int, int]


class Kernel:
    """A Triton kernel, called as `kernel(grid, *arguments, **constants)`.

    The first launch of a kind goes through Triton, which compiles what is new to it and works out for each
    launch, in 20 to 35 us, which compiled form it is; later ones go to that form itself. Kinds are told apart
    by what Triton tells them apart by, or more finely: constants, numbers but those that it is not to
    specialise for, and each tensor's dtype and whether it starts on a multiple of 16 bytes. For one device in
    a process.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[tuple[object, ...], Any] = {}
        if not isinstance(function, triton.JITFunction):  # interpreted
            return
        params = function.params
        self._constants = [param.name for param in params if param.is_constexpr]
        self._free = {param.num for param in params if param.do_not_specialize}

    def __call__(self, grid: Grid, *arguments: Any, **constants: Any) -> None:
        if not isinstance(self._function, triton.JITFunction):
            self._function[grid](*arguments, **constants)
            return
        key = self._kind_of(arguments, constants)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments, *[constants[name] for name in self._constants])
            return
        compiled = self._function[grid](*arguments, **constants)
        if compiled is not None:
            self._compiled[key] = compiled

    def _kind_of(self, arguments: Sequence[Any], constants: dict[str, Any]) -> tuple[object, ...]:
        free = self._free
        kind = [
            (each.dtype, each.data_ptr() % ALIGNMENT_BYTES) if isinstance(each, Tensor) else each
            for i, each in enumerate(arguments)
            if i not in free
        ]
        return (*kind, *constants.values())


def kernel(**options: Any) -> Callable[[Any], Kernel]:
    """`triton.jit` with its options, for what is launched."""
    return lambda function: Kernel(triton.jit(function, **options))


def next_power_of_2(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


def num_warps_for(block: int) -> int:
    """Warps for a program that holds `block` elements: 16 a thread, at most 8 warps."""
    return max(1, min(8, block // _ELEMENTS_PER_WARP))


@cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS_WITHOUT_GPU
    cuda: Any = torch.cuda
    return int(cuda.get_device_properties(device).multi_processor_count)


def capability(device: torch.device) -> int:
    """90 for 9.0."""
    return _capability(device) if device.type == "cuda" else CAPABILITY_WITHOUT_GPU


@cache
def _capability(device: torch.device) -> int:
    cuda: Any = torch.cuda
    major, minor = cuda.get_device_capability(device)
    return int(10 * major + minor)


def early_options(device: torch.device) -> dict[str, Any]:
    """Options of a kernel that is launched early: its programs begin when all of the kernel ahead of it have
    (`gdc_launch_dependents`), and wait before anything else for its end (`gdc_wait`), so that what a launch
    takes passes meanwhile. Hopper and later have it (CUDA C++ Programming Guide, Programmatic Dependent
    Launch); elsewhere none."""
    return {"launch_pdl": True} if capability(device) >= _FIRST_WITH_EARLY_LAUNCH else {}


def chunk_room(num_chunks: int) -> int:
    """A number of chunks for which kernels are compiled, `num_chunks` at least: one of few, so that steps of
    any size find theirs compiled."""
    return next((size for size in _CHUNK_SIZES if size >= num_chunks), next_power_of_2(num_chunks))


@cache
def dot_options(dtype: torch.dtype) -> dict[str, Any]:
    """Constants of kernels with `tl.dot`: fp32 operands are not cut to TF32, but are sums of two TF32 values
    (three products, near fp32's own accuracy, and on tensor cores), and Triton's interpreter, whose product
    does not know bfloat16, gets them as fp32."""
    is_wide = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    return {
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "OPERAND": tl.float32 if is_wide else _TRITON_DTYPES[dtype],
    }


@triton.jit  # type: ignore[untyped-decorator]
def columns_of(tile, end_0, end_1, end_2, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(module, its first column, its end, the first column of `tile`) of a tile over up to three modules."""
    tiles_0 = (end_0 + COLUMNS - 1) // COLUMNS
    tiles_1 = tiles_0 + (end_1 - end_0 + COLUMNS - 1) // COLUMNS
    module = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_1).to(tl.int32)
    low = tl.where(module == 0, 0, tl.where(module == 1, end_0, end_1))
    high = tl.where(module == 0, end_0, tl.where(module == 1, end_1, end_2))
    before = tl.where(module == 0, 0, tl.where(module == 1, tiles_0, tiles_1))
    return module, low, high, low + (tile - before) * COLUMNS


def column_tiles(y: Tensor, out_offsets: Sequence[int], columns: int) -> tuple[int, tuple[int, int, int]]:
    """How many tiles of `columns` cover y's modules, and where each of three modules ends; one that is not
    there is empty."""
    assert y.stride(1) == 1
    return _column_tiles(y.shape[1], tuple(out_offsets), columns)


@cache
def _column_tiles(width: int, out_offsets: tuple[int, ...], columns: int) -> tuple[int, tuple[int, int, int]]:
    assert 1 <= len(out_offsets) <= 3
    bounds = [*out_offsets, *[width] * (4 - len(out_offsets))]
    ends = (bounds[1], bounds[2], bounds[3])
    return sum(triton.cdiv(high - low, columns) for low, high in zip(bounds[:3], ends, strict=True)), ends


@cache
def check_aligned(dtype: torch.dtype, *sizes: int) -> None:
    """Raises ValueError for a module size with which blocks would not start on `ALIGNMENT_BYTES`."""
    multiple = ALIGNMENT_BYTES // dtype.itemsize
    for size in sizes:
        if size % multiple:
            raise ValueError(
                f"a projection has {size} inputs or outputs; on a GPU they must be"
                f" a multiple of {multiple} in {dtype}"
            )
