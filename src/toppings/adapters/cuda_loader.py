"""Copies adapters to a CUDA device, in the order of streams.

    compute:  … kernels that read the old block, the pool's moves ── E0 ────── wait E2 ── kernels of layer 1
    copies:                                       wait E0 ── layer 0 ── E1 ── layer 1 ── E2 …

E0 is recorded when the load begins, on the stream of the thread that places adapters: what had room there
before, and whatever the pool moved to make room, is out of the way when the first copy is made.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch

from toppings.adapters.arena import within_pieces
from toppings.adapters.layout import LoadOrder
from toppings.adapters.loader import Loader, LoadHandle, LoadJob, LoadSource, LoadStep

GROUP_BYTES = 1 << 20
"""Copies up to this size together have one event: for small layers, events cost more than the copies do."""


class CudaLoader(Loader):
    """Asynchronous copies from page-locked host memory, one a layer (two at a border of the arena's pieces),
    on a stream of their own; an event after each group of them.

    `cuda` is the `torch.cuda` module (tests give a fake). Host entries must stay until the handle is done.
    """

    def __init__(self, arena: torch.Tensor, *, cuda: Any = torch.cuda) -> None:
        self._arena = arena.view(torch.uint8)
        self._cuda = cuda
        self._stream = cuda.Stream()
        super().__init__()

    def _make_handle(self, source: LoadSource, order: LoadOrder) -> LoadHandle:
        blocks_free = self._cuda.Event()
        blocks_free.record(self._cuda.current_stream())
        return CudaLoadHandle(source, order, self._cuda, blocks_free)

    def _next_steps(self, job: LoadJob) -> Sequence[LoadStep]:
        steps: list[LoadStep] = []
        num_bytes = 0
        for step in job.handle.steps_to_do:
            if num_bytes >= GROUP_BYTES or step.layer >= job.source.num_layers_ready:
                break
            steps.append(step)
            num_bytes += step.stop - step.start
        return steps

    def _copy(self, job: LoadJob, steps: Sequence[LoadStep]) -> None:
        handle = job.handle
        assert isinstance(handle, CudaLoadHandle)
        self._cuda.set_device(self._stream.device)  # threads begin on device 0, and leave a context there
        with self._cuda.stream(self._stream):
            if handle.begun is None:
                self._stream.wait_event(handle.blocks_free)
                handle.begun, handle.begun_at = self._record(), time.perf_counter()
            for step in steps:
                first = job.offsets_bytes[step.layer] + step.start
                view = job.source.layer_view(step.layer)[step.start : step.stop]
                for start, stop in within_pieces(view):
                    source = torch.from_numpy(view[start:stop])
                    self._arena[first + start : first + stop].copy_(source, non_blocking=True)
            handle.events += [self._record()] * len(steps)

    def _settle(self) -> None:
        self._stream.synchronize()

    def _record(self) -> Any:
        event = self._cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


class CudaLoadHandle(LoadHandle):
    """`wait` makes the current stream wait, not the caller, except until the copy has been queued.

    `landed_at` says when a copy was queued; the device's own times are in `copy_ms`.
    """

    def __init__(self, source: LoadSource, order: LoadOrder, cuda: Any, blocks_free: Any) -> None:
        super().__init__(source, order)
        self._cuda = cuda
        self.blocks_free = blocks_free
        self.begun: Any = None
        self.begun_at = 0.0  # time.perf_counter
        self.events: list[Any] = []  # of each step that has been queued
        self._last_steps = {step.layer: i for i, step in enumerate(self.steps)}

    def _has_landed(self, layer: int, halves: str) -> bool:
        return all(
            i < len(self.events) and self.events[i].query()
            for i, step in enumerate(self.steps)
            if step.layer == layer and set(step.halves) & set(halves)
        )

    def layer_ready(self, layer: int) -> bool:
        return self._has_landed(layer, "AB")

    def b_ready(self, layer: int) -> bool:
        return self._has_landed(layer, "B")

    @property
    def done(self) -> bool:
        return len(self.events) == len(self.steps) and bool(self.events[-1].query())

    @property
    def copy_ms(self) -> float:
        return float(self.begun.elapsed_time(self.events[-1])) if self.done else 0.0

    def copies(self) -> list[tuple[float, float] | None]:
        """By the device's own clock, from when the first copy was queued: a layer's copy begins when the
        group before its own has landed."""
        found: list[tuple[float, float] | None] = [None] * self.num_layers
        begin = end = self.begun_at
        last = self.begun
        first: dict[int, float] = {}
        for index, (step, event) in enumerate(zip(self.steps, list(self.events), strict=False)):
            if not event.query():
                break
            if event is not last:
                begin, end = end, self.begun_at + self.begun.elapsed_time(event) / 1e3
                last = event
            first.setdefault(step.layer, begin)
            if index == self._last_steps[step.layer]:
                found[step.layer] = (first[step.layer], end)
        return found

    def wait(self, layer: int) -> None:
        self._wait_for_step(self._last_steps[layer])

    def wait_b(self, layer: int) -> None:
        index = next(i for i, step in enumerate(self.steps) if step.layer == layer and "B" in step.halves)
        self._wait_for_step(index)

    def wait_all(self) -> None:
        self._wait_for_step(len(self.steps) - 1)

    def _wait_for_step(self, index: int) -> None:
        """The copies are made in order, on one stream: the last one's event is enough."""
        with self._changed:
            self._changed.wait_for(lambda: self.error is not None or len(self.events) > index)
        if len(self.events) <= index:
            assert self.error is not None
            raise self.error
        self._cuda.current_stream().wait_event(self.events[index])
