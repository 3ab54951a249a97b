"""Copies adapters from host memory to the device pool, layer by layer, in the background.

A handle says what has landed. One thread serves all loads: the link is one, and what came first is first,
except that a load whose layer is still being read from disk lets those behind it pass.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from toppings.adapters.errors import AdapterError
from toppings.adapters.layout import AdapterLayout, LoadOrder, by_layer
from toppings.adapters.link import EmulatedLink
from toppings.ops.device_faults import is_sticky
from toppings.vital import VitalThread

Bytes = npt.NDArray[np.uint8]

CLOSE_TIMEOUT_S = 5.0
"""How long what is on its way at the end may take to arrive."""

logger = logging.getLogger(__name__)


class LoadSource(Protocol):
    """An adapter in host memory, perhaps still being read (a `HostEntry`)."""

    adapter_id: int

    @property
    def num_layers_ready(self) -> int: ...

    @property
    def error(self) -> AdapterError | None: ...

    @property
    def layout(self) -> AdapterLayout: ...

    def layer_view(self, layer: int) -> Bytes: ...


@dataclass(frozen=True, slots=True)
class LoadStep:
    """One copy: bytes `[start, stop)` of a layer's block, after which its A, its B or both have landed."""

    layer: int
    start: int
    stop: int
    halves: str  # "A", "B" or "AB"


class LoadHandle:
    """How far one load is. `started_at` and `landed_at` (None: under way) are of `time.perf_counter`."""

    def __init__(self, source: LoadSource, order: LoadOrder) -> None:
        self.adapter_id = source.adapter_id
        self.layout = source.layout
        self.num_layers = source.layout.num_layers
        self.num_bytes = source.layout.num_bytes
        self.error: AdapterError | None = None
        self.started_at = time.perf_counter()
        self.landed_at: list[float | None] = [None] * self.num_layers
        self._begun_at: list[float | None] = [None] * self.num_layers
        self.steps = plan_steps(source.layout, order)
        self._num_steps_done = 0
        self._copy_time = 0.0
        self._missing = {"A": set(range(self.num_layers)), "B": set(range(self.num_layers))}
        self._changed = threading.Condition()

    def layer_ready(self, layer: int) -> bool:
        """The layer's whole block is on the device; never blocks."""
        return layer not in self._missing["A"] and layer not in self._missing["B"]

    def b_ready(self, layer: int) -> bool:
        """The layer's B half is on the device; never blocks."""
        return layer not in self._missing["B"]

    @property
    def num_layers_ready(self) -> int:
        return sum(self.layer_ready(layer) for layer in range(self.num_layers))

    @property
    def done(self) -> bool:
        return self._num_steps_done == len(self.steps)

    @property
    def copy_ms(self) -> float:
        """Time the copies themselves took so far, without waiting for the disk or for other loads."""
        return self._copy_time * 1e3

    def copies(self) -> list[tuple[float, float] | None]:
        """When each layer's copy began and when it landed, of `time.perf_counter`; None: it has not yet."""
        times = zip(self._begun_at, self.landed_at, strict=True)
        return [None if begun is None or landed is None else (begun, landed) for begun, landed in times]

    def wait(self, layer: int) -> None:
        """Returns when work that starts now finds the layer there. Raises AdapterError if it never comes."""
        self._await(lambda: self.layer_ready(layer))

    def wait_b(self, layer: int) -> None:
        """`wait`, for the layer's B half alone."""
        self._await(lambda: self.b_ready(layer))

    def _await(self, is_there: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.error is not None or is_there())
        if not is_there():
            assert self.error is not None
            raise self.error

    def wait_all(self) -> None:
        """`wait` for every layer."""
        for layer in range(self.num_layers):
            self.wait(layer)

    @property
    def steps_to_do(self) -> Iterator[LoadStep]:
        return islice(self.steps, self._num_steps_done, None)

    def _finish(self, steps: Sequence[LoadStep], copy_time: float) -> None:
        """The next `steps` have been copied, or set on their way."""
        now = time.perf_counter()
        with self._changed:
            self._copy_time += copy_time
            for step in steps:
                self._begun_at[step.layer] = self._begun_at[step.layer] or now - copy_time
                for half in step.halves:
                    self._missing[half].discard(step.layer)
                if all(step.layer not in missing for missing in self._missing.values()):
                    self.landed_at[step.layer] = now
            self._num_steps_done += len(steps)
            self._changed.notify_all()

    def _fail(self, error: AdapterError) -> None:
        with self._changed:
            self.error = error
            self._changed.notify_all()


def plan_steps(layout: AdapterLayout, order: LoadOrder) -> list[LoadStep]:
    """The copies of a load, in order; every layer appears, with an empty copy where nothing is targeted."""
    halves = sorted((layer, half) for layer, both in order for half in both)
    assert halves == [(layer, half) for layer in range(layout.num_layers) for half in "AB"], order
    return [_plan_step(layout, layer, both) for layer, both in order]


def _plan_step(layout: AdapterLayout, layer: int, halves: str) -> LoadStep:
    middle, end = layout.layers[layer].numel_a * layout.item_bytes, layout.layer_bytes(layer)
    return LoadStep(layer, 0 if "A" in halves else middle, end if "B" in halves else middle, halves)


@dataclass(slots=True)
class LoadJob:
    source: LoadSource
    offsets_bytes: list[int]  # of each layer's block in the arena
    handle: LoadHandle

    @property
    def can_proceed(self) -> bool:
        next_step = next(self.handle.steps_to_do)
        return self.source.error is not None or self.source.num_layers_ready > next_step.layer


class Loader(ABC):
    """The thread and its queue; a subclass says how bytes travel."""

    def __init__(self) -> None:
        self._jobs: list[LoadJob] = []
        self._wake = threading.Condition()
        self._is_closed = False
        self._thread = VitalThread(self._run, "adapter-loader")
        self._thread.start()

    def start(
        self, source: LoadSource, offsets_bytes: list[int], order: LoadOrder | None = None
    ) -> LoadHandle:
        """Begins to copy `source` to the arena, whose blocks must stay where they are until it is done.

        `order`: by default whole blocks, layer by layer. Raises EngineLostError.
        """
        order = order or by_layer(range(source.layout.num_layers))
        handle = self._make_handle(source, order)
        with self._wake:
            self.check()
            assert not self._is_closed
            self._jobs.append(LoadJob(source, offsets_bytes, handle))
            self._wake.notify()
        return handle

    def part_of(self, entry: LoadSource) -> LoadSource:
        """What of an adapter in host memory comes to this device: all of it."""
        return entry

    def is_over(self, handle: LoadHandle) -> bool:
        """Nobody copies from its source or to its blocks any more."""
        return handle.done

    def notify(self) -> None:
        """A source has more layers, or has failed."""
        with self._wake:
            self._wake.notify()

    def check(self) -> None:
        """Raises EngineLostError where nothing will be loaded any more."""
        self._thread.check()

    def close(self) -> None:
        """Ends the thread, unless its device hangs; loads under way fail."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _make_handle(self, source: LoadSource, order: LoadOrder) -> LoadHandle:
        return LoadHandle(source, order)

    def _next_steps(self, job: LoadJob) -> Sequence[LoadStep]:
        """What to copy at once of a job that can proceed: its next copy, at least."""
        return [next(job.handle.steps_to_do)]

    @abstractmethod
    def _copy(self, job: LoadJob, steps: Sequence[LoadStep]) -> None:
        """Brings the steps' bytes to the device, or sets them on their way there."""

    @abstractmethod
    def _settle(self) -> None:
        """Returns when nothing is on its way: memory at either end may then be used for something else."""

    def _run(self) -> None:
        try:
            while (job := self._await_job()) is not None:
                self._advance(job)
        finally:
            self._end_all()

    def _await_job(self) -> LoadJob | None:
        """None when the loader is closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._is_closed or self._next_job() is not None)
            return None if self._is_closed else self._next_job()

    def _end_all(self) -> None:
        """Waiters first: a device that has failed may fail, or hang, once more where it is to be settled."""
        with self._wake:
            self._is_closed = True
            jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.handle._fail(AdapterError(f"adapter {job.handle.adapter_id}: the loader was closed"))
        self._settle_quietly()

    def _settle_quietly(self) -> None:
        try:
            self._settle()
        except Exception as error:
            logger.warning("copies to the device may not be over: %s", error)

    def _next_job(self) -> LoadJob | None:
        return next((job for job in self._jobs if job.can_proceed), None)

    def _advance(self, job: LoadJob) -> None:
        """Does the job's next copies and takes it off the queue after the last one."""
        handle = job.handle
        try:
            if job.source.error is not None:
                raise job.source.error
            started_at = time.perf_counter()
            steps = self._next_steps(job)
            self._copy(job, steps)
            is_last = handle._num_steps_done + len(steps) == len(handle.steps)
            if is_last:
                self._drop(job)
            handle._finish(steps, time.perf_counter() - started_at)
        except Exception as error:  # whatever it is, whoever waits for the layer must hear of it
            self._drop(job)
            self._fail(handle, error)
            if is_sticky(error):
                raise  # this thread's end is the engine's

    def _fail(self, handle: LoadHandle, error: Exception) -> None:
        """Tells the waiters when nothing is on its way any more, so that who frees the blocks may. Where the
        device's context is lost there is nothing to wait for."""
        if not is_sticky(error):
            self._settle_quietly()
        handle._fail(error if isinstance(error, AdapterError) else AdapterError(f"load failed: {error}"))

    def _drop(self, job: LoadJob) -> None:
        with self._wake, suppress(ValueError):  # already gone
            self._jobs.remove(job)


class CpuLoader(Loader):
    """Copies within host memory; numpy's copy runs without the interpreter lock and without torch's threads.

    With `link_gbps` (10^9 bytes per second, 0: off) copies take the time that a link of this speed would take
    one after another: an emulated link.
    """

    def __init__(self, arena: torch.Tensor, *, link_gbps: float = 0.0) -> None:
        self._arena: Bytes = arena.view(torch.uint8).numpy()
        self._link = EmulatedLink(link_gbps) if link_gbps else None
        super().__init__()

    def _copy(self, job: LoadJob, steps: Sequence[LoadStep]) -> None:
        (step,) = steps
        offset = job.offsets_bytes[step.layer]
        started_at = time.perf_counter()
        if step.stop > step.start:
            source = job.source.layer_view(step.layer)[step.start : step.stop]
            np.copyto(self._arena[offset + step.start : offset + step.stop], source)
        if self._link is not None:
            self._link.wait_for_transfer(started_at, step.stop - step.start)

    def _settle(self) -> None:
        """Copies are over when they return."""
