"""Copies adapters to a CUDA device, in the order of streams."""

from typing import Any

import torch

from toppings.adapters.layout import LoadOrder
from toppings.adapters.loader import Loader, LoadHandle, LoadJob, LoadSource, LoadStep


class CudaLoader(Loader):
    """Asynchronous copies from page-locked host memory on a stream of its own, an event after each copy.

    `cuda` is the `torch.cuda` module (tests give a fake). Host entries must stay until the handle is done.
    """

    def __init__(self, arena: torch.Tensor, *, cuda: Any = torch.cuda) -> None:
        self._arena = arena.view(torch.uint8)
        self._cuda = cuda
        self._stream = cuda.Stream()
        super().__init__()

    def _make_handle(self, source: LoadSource, order: LoadOrder) -> LoadHandle:
        # Kernels that are queued by now may still read what stood in the blocks: the copies come after.
        blocks_free = self._cuda.Event()
        blocks_free.record(self._cuda.current_stream())
        return CudaLoadHandle(source, order, self._cuda, blocks_free)

    def _copy(self, job: LoadJob, step: LoadStep) -> None:
        handle = job.handle
        assert isinstance(handle, CudaLoadHandle)
        offset = job.offsets_bytes[step.layer]
        with self._cuda.stream(self._stream):
            if handle.begun is None:
                self._stream.wait_event(handle.blocks_free)
                handle.begun = self._record()
            if step.stop > step.start:
                source = torch.from_numpy(job.source.layer_view(step.layer)[step.start : step.stop])
                self._arena[offset + step.start : offset + step.stop].copy_(source, non_blocking=True)
            handle.events.append(self._record())

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
        self.events: list[Any] = []  # one per step that has been queued

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

    def wait(self, layer: int) -> None:
        mine = [i for i, step in enumerate(self.steps) if step.layer == layer]
        with self._changed:
            self._changed.wait_for(lambda: self.error is not None or len(self.events) > mine[-1])
        if len(self.events) <= mine[-1]:
            assert self.error is not None
            raise self.error
        for i in mine:
            self._cuda.current_stream().wait_event(self.events[i])
