"""numba kernels that run on torch's own threads.

A kernel is one function of `block`, the address of a row of 64-bit words: [next task, number of tasks,
operands ...]. Every thread that runs it claims tasks until none is left. The pointer's type names the element
format of the tensors: uint16 is bfloat16, int16 is float16, float32 is itself (numba has no 16-bit floats).

The threads are torch's: its OpenMP library is called by name. A pool of numba's own would hold the cores,
spinning, whenever torch's pool wants them, and the other way round. Passing addresses also makes a call cost
a few microseconds less than converting tensors to arrays would.
"""

import ctypes
import struct
import threading
from array import array as words
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import torch
from numba import types
from numba.core.cgutils import ir
from numba.extending import intrinsic
from torch import Tensor

# Sums may be reordered; NaN and infinity keep their meaning (no "nnan", "ninf").
FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}
_FORMATS = {torch.bfloat16: types.uint16, torch.float16: types.int16, torch.float32: types.float32}
_GRAIN = 16384
"""Elements to go through for which another thread is worth waking."""
_WORD = ir.IntType(64)
_FIRST_OPERAND = 2


def _find_team() -> tuple[Any, str]:
    """torch's OpenMP entry point, and where it was found or why there is none."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        try:
            entry = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        entry.restype = None
        return entry, f"torch's OpenMP is {library.name}"
    return None, "torch's OpenMP library was not found: kernels run on one thread"


_RUN_ON_TEAM, TEAM_REASON = _find_team()
USE_TEAM = _RUN_ON_TEAM is not None
"""Kernels with enough work run on as many threads as torch's operators."""


@dataclass(frozen=True)
class KernelCall:
    """What a kernel was called with: its address, its words, for how many threads there is work, and the
    tensors that its words point to."""

    address: int
    block: "words[int]"
    max_threads: int
    tensors: tuple[Tensor, ...]


_recording = threading.local()


def record_to(note: Callable[[KernelCall], None] | None) -> None:
    """From now on this thread's kernels are not run but given to `note`; None: they are run again."""
    _recording.note = note


class Kernel:
    """A compiled kernel per element format; compiled at its first call, kept in numba's cache on disk."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        self._function = function
        self._compiled: dict[torch.dtype, tuple[int, Any]] = {}

    def __call__(self, like: Tensor, num_tasks: int, size: int, *operands: Tensor | int | float) -> None:
        """Runs all tasks. `like` names the element format; `size`: elements to go through, for the number of
        threads. Tensors are passed by address: the kernel has to know their layout."""
        address, run = self._compiled.get(like.dtype) or self._compile(like.dtype)
        block = words("q", [0, num_tasks, *map(_word, operands)])
        num_threads = min(num_tasks, 1 + size // _GRAIN)
        if (note := getattr(_recording, "note", None)) is not None:
            tensors = tuple(each for each in operands if isinstance(each, Tensor))
            note(KernelCall(address, block, num_threads, tensors))
        elif num_threads > 1 and USE_TEAM:
            num_threads = min(num_threads, torch.get_num_threads())
            _RUN_ON_TEAM(address, block.buffer_info()[0], num_threads, 0)
        elif num_threads > 1:
            # Without the interpreter lock: other threads of the process have a word to say meanwhile.
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(block.buffer_info()[0])
        else:
            run(block.buffer_info()[0])

    def run_on(self, num_threads: int, *operands: Tensor | int) -> None:
        """For a kernel that is run once by each thread, of `num_threads` or fewer."""
        address, _ = self._compiled.get(torch.float32) or self._compile(torch.float32)
        block = words("q", [0, num_threads, *map(_word, operands)])
        if num_threads > 1 and USE_TEAM:
            _RUN_ON_TEAM(address, block.buffer_info()[0], num_threads, 0)
        else:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(block.buffer_info()[0])

    def _compile(self, dtype: torch.dtype) -> tuple[int, Any]:
        signature = types.void(types.CPointer(_FORMATS[dtype]))
        compiled = numba.cfunc(signature, cache=True, fastmath=FAST_MATH, error_model="numpy")(self._function)
        # PYFUNCTYPE keeps the interpreter lock: too short a call to give it away.
        run = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
        self._compiled[dtype] = compiled.address, run
        return self._compiled[dtype]


def _word(operand: Tensor | int | float) -> int:
    if isinstance(operand, Tensor):
        return operand.data_ptr()
    if isinstance(operand, float):
        bits: int = struct.unpack("q", struct.pack("d", operand))[0]
        return bits
    return operand


# --- inside a kernel ---


def _slot(builder: Any, block: Any, index: Any) -> Any:
    return builder.gep(builder.bitcast(block, _WORD.as_pointer()), [index])


@intrinsic  # type: ignore[untyped-decorator]
def _take_number(typing_context: Any, block: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _slot(builder, args[0], _WORD(0)), _WORD(1), "monotonic")

    return types.int64(block), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _read_word(typing_context: Any, block: Any, index: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_slot(builder, *args))

    return types.int64(block, types.intp), codegen


@numba.njit  # type: ignore[untyped-decorator]
def claim(block: Any) -> int:
    """The number of a task that no other thread has, or -1 when none is left."""
    task: int = _take_number(block)
    return task if task < _read_word(block, 1) else -1


@numba.njit  # type: ignore[untyped-decorator]
def integer(block: Any, index: int) -> int:
    """Operand `index`, an int or a tensor's address."""
    word: int = _read_word(block, index + _FIRST_OPERAND)
    return word


@intrinsic  # type: ignore[untyped-decorator]
def real(typing_context: Any, block: Any, index: Any) -> Any:
    """Operand `index`, a float."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        slot = _slot(builder, args[0], builder.add(args[1], _WORD(_FIRST_OPERAND)))
        value = builder.load(builder.bitcast(slot, ir.DoubleType().as_pointer()))
        return builder.fptrunc(value, ir.FloatType())

    return types.float32(block, types.intp), codegen
