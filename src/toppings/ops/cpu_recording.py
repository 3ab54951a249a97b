"""A step's work on the CPU, recorded once and run again: of a decode step's few rows the kernels take
microseconds each, and calling them from Python as much.

While a `Recorder` is active in a thread, kernels are not run but noted, with the addresses that they are
called with; what is torch's own runs and is noted too (a `TorchDispatchMode` sees it, so that nothing is left
out). The `Recording` runs neighbouring kernels in one call: every thread of torch's team goes through those
with enough work for many, and claims tasks of each until none is left.

Whoever records sees to it that what the work reads stays where it is, and that nothing of the work depends
on values that Python reads. Buffers that are allocated meanwhile are the recorder's `Memory`; recordings that
share one must not run at the same time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from numba import types
from numba.core import cgutils
from numba.core.cgutils import ir
from numba.extending import intrinsic
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from toppings.ops import cpu_kernel
from toppings.ops.cpu_bits import Pointer, helper, int64s, load
from toppings.ops.cpu_kernel import Kernel, KernelCall, integer

_ALIGNMENT = 64
_CHUNK_BYTES = 1 << 20


_WORD = ir.IntType(64)


def _pointer(builder: Any, address: Any, index: int = 0) -> Any:
    return builder.gep(builder.inttoptr(address, _WORD.as_pointer()), [_WORD(index)])


@intrinsic  # type: ignore[untyped-decorator]
def _call(typing_context: Any, address: Any, block: Any) -> Any:
    """Runs the kernel at `address` on the words at `block`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_WORD])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _look(typing_context: Any, state: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0]), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _put(typing_context: Any, state: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _replace(typing_context: Any, state: Any, old: Any, new: Any) -> Any:
    """Whether the word was `old`, and is `new` now."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        done = builder.cmpxchg(_pointer(builder, args[0]), args[1], args[2], "acq_rel", "acquire")
        return builder.extract_value(done, 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _decrease(typing_context: Any, state: Any) -> Any:
    """By one; returns what the word is now."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        was = builder.atomic_rmw("sub", _pointer(builder, args[0]), _WORD(1), "acq_rel")
        return builder.sub(was, _WORD(1))

    return types.int64(types.int64), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _give_way(typing_context: Any) -> Any:
    """Lets another thread have the core, where one waits for it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])

    return types.int32(), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _rewind(typing_context: Any, block: Any) -> Any:
    """The tasks of the kernel whose words lie at `block` can be claimed again."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(_WORD(0), _pointer(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


_SPINS = 2000
"""Looks at whether there is more to do, some microseconds, before the core is offered to other threads."""
_SHIFT = 16
"""The state's word: the kernel at hand, above the number of threads that are in it; negative while one of
them prepares the next."""


@helper
def _run_alone(table: Pointer, i: int, count: int) -> int:
    """The kernels from i on for which one thread is enough; returns the next that wants more."""
    while i < count and load(table, 3 * i + 2) == 1:
        _call(load(table, 3 * i), load(table, 3 * i + 1))
        _rewind(load(table, 3 * i + 1))
        i += 1
    return i


@Kernel
def _run_kernels(block: Any) -> None:
    """Every thread runs this once. Operands: a row (kernel's address, its words', threads that it is worth)
    for each kernel, their number, and the state's word, 0.

    A kernel is over when its tasks are claimed and nobody is in it: a thread that has none of them, since it
    has yet to begin or its core is another's, is waited for by nobody. Who leaves last runs what follows and
    one is enough for, before anybody enters the next."""
    table, count, state = int64s(block, 0), integer(block, 1), integer(block, 2)
    left, num_looks = -1, 0
    now = _look(state)
    while now < 0 or now >> _SHIFT < count:
        i = now >> _SHIFT
        if now < 0 or i == left:
            num_looks += 1
            if num_looks > _SPINS:
                _give_way()
        elif _replace(state, now, now + 1):
            left, num_looks = i, 0
            _call(load(table, 3 * i), load(table, 3 * i + 1))
            if _decrease(state) == i << _SHIFT and _replace(state, i << _SHIFT, -1):
                _rewind(load(table, 3 * i + 1))
                _put(state, _run_alone(table, i + 1, count) << _SHIFT)
        now = _look(state)


@dataclass
class Memory:
    """Buffers for recordings of which one runs at a time: each takes them from the start."""

    chunks: list[Tensor] = field(default_factory=list)
    index: int = 0  # of the chunk in use, and
    used: int = 0  # bytes of it

    def rewind(self) -> None:
        self.index = self.used = 0

    def like(self, tensor: Tensor) -> Tensor:
        """A dense buffer of the tensor's shape and type."""
        num_bytes = -(-max(tensor.nbytes, 1) // _ALIGNMENT) * _ALIGNMENT
        while self.index < len(self.chunks) and self.used + num_bytes > self.chunks[self.index].numel():
            self.index, self.used = self.index + 1, 0
        if self.index == len(self.chunks):
            self.chunks.append(torch.empty(max(num_bytes, _CHUNK_BYTES), dtype=torch.uint8))
        start, self.used = self.used, self.used + num_bytes
        part = self.chunks[self.index][start : start + tensor.nbytes]
        return part.view(tensor.dtype).view(tensor.shape)


_Entry = KernelCall | Callable[[], object]


class Recording:
    """Work that was recorded; `replay` runs it in the calling thread and torch's team."""

    def __init__(self, entries: list[_Entry]) -> None:
        self._entries = entries  # keeps words and what they point to
        self._runs: list[Callable[[], object]] = []
        for is_kernel, group in groupby(entries, lambda entry: isinstance(entry, KernelCall)):
            alike: list[Any] = list(group)
            self._runs += [_native(alike)] if is_kernel else alike

    @property
    def num_torch_calls(self) -> int:
        return sum(not isinstance(entry, KernelCall) for entry in self._entries)

    def replay(self) -> None:
        for run in self._runs:
            run()


def _native(calls: list[KernelCall]) -> Callable[[], None]:
    rows = [(call.address, call.block.buffer_info()[0], call.max_threads) for call in calls]
    table, state = torch.tensor(rows, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    max_threads = max(call.max_threads for call in calls)

    def run() -> None:
        state.zero_()
        _run_kernels.run_on(min(max_threads, torch.get_num_threads()), table, len(calls), state)

    return run


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`with Recorder(memory) as recorder: work()`, then `recorder.recording()`.

    Raises ValueError out of the work where a value is read from a tensor: the next run's would not be."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory
        self._entries: list[_Entry] = []
        memory.rewind()

    def __enter__(self) -> "Recorder":
        cpu_kernel.record_to(self._entries.append)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        cpu_kernel.record_to(None)

    def recording(self) -> Recording:
        return Recording(self._entries)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name()
        if name.startswith("aten::_local_scalar"):
            raise ValueError("work that reads a tensor's values cannot be recorded")
        result = func(*args, **kwargs)
        if name.startswith(("aten::empty", "aten::new_empty")):
            return self._memory.like(result)
        if func._schema.is_mutable:
            self._entries.append(lambda: func(*args, **kwargs))
        elif not _storages(result) <= _storages((args, kwargs)):  # else a view
            return self._again(func, args, kwargs, result)
        return result

    def _again(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Has the result computed anew into a buffer that stays."""
        if not isinstance(result, Tensor):
            raise ValueError(f"{func.name()} cannot be recorded: it gives more than one tensor")
        kept = self._memory.like(result)
        kept.copy_(result)
        self._entries.append(lambda: kept.copy_(func(*args, **kwargs)))
        return kept


def _storages(values: Any) -> set[int]:
    """Where the memory of all tensors in `values` begins; an operator's own layouts have none to see."""
    leaves = tree_leaves(values)
    tensors = (each for each in leaves if isinstance(each, Tensor) and each.layout == torch.strided)
    return {each.untyped_storage().data_ptr() for each in tensors}
