"""Measures a `CostProfile` on the machine that serves, in a few seconds.

`measure` asks a `Probes` for single times and fits the model to them; `EngineProbes` takes them from a real
pool of workers, the base model's forward and the loader.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from toppings.adapters.device_pool import DevicePool
from toppings.adapters.errors import AdapterError
from toppings.adapters.layout import BLOCK_ALIGNMENT_BYTES, AdapterLayout, BaseShapes
from toppings.adapters.loader import Bytes, Loader
from toppings.assist.cost import CostProfile, CpuCost, cpu_features
from toppings.assist.exchange import AssistStats, Exchange, Piece
from toppings.assist.pool import Worker, WorkerPool
from toppings.assist.product import Form, GroupWeights
from toppings.core import MODULES
from toppings.least_squares import fit_non_negative

SLICE_ROWS = (16, 64, 256)
SLICE_RANKS = (8, 64, 192)
LAYER_TOKENS = (1, 32, 128, 512)
TYPICAL_TOKENS = 64
TYPICAL_RANK = 64
REPEATS = 3
NUM_QUEUED = 16


class Probes(Protocol):
    """Times of single actions on the machine, in seconds."""

    def copy_s(self, num_bytes: int) -> float:
        """One copy of a layer's block to the device, by the loader."""

    def slice_s(self, num_rows: int, rank: int, num_in: int, num_out: int) -> float:
        """A slice's way: rows to an awake worker, shrink and expand, the result added to an output."""

    def wake_s(self) -> float:
        """What the first slice of a session takes more than the next ones."""

    def layer_s(self, num_tokens: int) -> tuple[float, float]:
        """The base model's time for one layer, and the part of it in base products."""

    def slowdown(self, num_tokens: int) -> float:
        """Factor on `layer_s` while all workers compute."""

    def queue_s(self) -> tuple[float, float]:
        """The host's time to queue a layer, and a slice's way there and back; 0 where it does not queue."""


def measure(
    probes: Probes,
    shapes: BaseShapes,
    *,
    num_workers: int,
    origin: str,
    max_tokens: int = LAYER_TOKENS[-1],
    has_results_on_link: bool = False,
) -> CostProfile:
    """The profile of a base model of `shapes`; prefills up to `max_tokens` are timed. `has_results_on_link`:
    rows and results travel as fast as weights do, which the slices' times leave out.

    The fitted intercept of `slice_s` becomes the round trip; the product has no fixed part of its own.
    """
    copy_ms, link_gbps = _fit_link(probes)
    round_trip_ms, *per_unit = _fit_slices(probes, shapes)
    tokens = sorted({min(count, max_tokens) for count in LAYER_TOKENS})
    layers = {count: probes.layer_s(count) for count in tokens}
    typical_tokens = min(TYPICAL_TOKENS, max_tokens)
    queue_layer_s, queue_piece_s = probes.queue_s()
    return CostProfile(
        origin=origin,
        link_gbps=link_gbps,
        copy_ms=copy_ms,
        cpu=CpuCost(0.0, *per_unit),
        layer_ms=tuple((count, layer_s * 1e3) for count, (layer_s, _) in layers.items()),
        gemm_share=statistics.median(min(1.0, gemm_s / layer_s) for layer_s, gemm_s in layers.values()),
        round_trip_ms=round_trip_ms,
        session_ms=max(0.0, probes.wake_s()) * 1e3,
        num_workers=num_workers,
        result_gbps=link_gbps if has_results_on_link else 0.0,
        sharing_slowdown=max(1.0, probes.slowdown(typical_tokens)),
        queue_layer_ms=queue_layer_s * 1e3,
        queue_piece_ms=queue_piece_s * 1e3,
        has_experts=shapes.mixture is not None,
    )


def _fit_link(probes: Probes) -> tuple[float, float]:
    """(ms per copy, 10^9 bytes per second) from copies of two sizes."""
    small, large = 1 << 16, 1 << 21
    small_s, large_s = probes.copy_s(small), probes.copy_s(large)
    seconds_per_byte = max(large_s - small_s, 0.1 * large_s) / (large - small)
    return max(0.0, small_s - small * seconds_per_byte) * 1e3, 1e-9 / seconds_per_byte


def _fit_slices(probes: Probes, shapes: BaseShapes) -> list[float]:
    """Coefficients of `cpu_features`, in ms, of the widest and narrowest projection, by relative errors."""
    sizes = sorted(set(shapes.sizes), key=sum)
    cases = list(product(SLICE_ROWS, SLICE_RANKS, {sizes[0], sizes[-1]}))
    features = np.array([cpu_features(rows, rank, *size) for rows, rank, size in cases])
    times_ms = np.array([probes.slice_s(rows, rank, *size) * 1e3 for rows, rank, size in cases])
    return list(map(float, fit_non_negative(features / times_ms[:, None], np.ones(len(cases)))))


# --- the real thing ---


class StopwatchLora:
    """A `LoraContext` that adds nothing and sums the time of the base products."""

    def __init__(self) -> None:
        self.gemm_s = 0.0
        self._started_at = 0.0

    def start(self, layer: int, group: str, x: Tensor) -> None:
        self._started_at = time.perf_counter()

    def finish(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        self.gemm_s += time.perf_counter() - self._started_at


class EventLora:
    """`StopwatchLora` for a device that works behind the host: `cuda` is `torch.cuda`, or a fake."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._events: list[Any] = []

    def start(self, layer: int, group: str, x: Tensor) -> None:
        self._record()

    def finish(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        self._record()

    def _record(self) -> None:
        self._events.append(self._cuda.Event(enable_timing=True))
        self._events[-1].record()

    @property
    def gemm_s(self) -> float:
        """Once the forward is over."""
        pairs = zip(self._events[::2], self._events[1::2], strict=True)
        return sum(float(start.elapsed_time(stop)) for start, stop in pairs) / 1e3


class BusyLora:
    """A `LoraContext` that keeps every worker busy beside the qkv products; `wait_s` is spent waiting
    for them."""

    def __init__(self, workers: Sequence[Worker], weights: GroupWeights) -> None:
        self.wait_s = 0.0
        self._workers = workers
        self._weights = weights
        self._tickets: list[tuple[Worker, int]] = []

    def start(self, layer: int, group: str, x: Tensor) -> None:
        rows = x[: -(-x.shape[0] // max(1, len(self._workers)))]
        for worker in self._workers if group == "qkv" else ():
            worker.recycle()
            ticket = worker.try_post(Form.FULL, self._weights, rows)
            if ticket is not None:
                self._tickets.append((worker, ticket.number))

    def finish(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        started_at = time.perf_counter()
        for worker, number in self._tickets:
            worker.wait(number)
        self._tickets = []
        self.wait_s += time.perf_counter() - started_at


ProbeLora = StopwatchLora | EventLora | BusyLora


@dataclass
class EngineProbes:
    """`forward(num_tokens, lora)` runs the base model once on a prompt of so many tokens; `copy_s` as in
    `Probes` (`LinkProbe` is one). The workers' weights are whatever lies at the start of the host arena.
    `cuda`: the `torch.cuda` module, or a fake, where the device is not the host: `device`, to which rows go
    and come back by `exchange`."""

    workers: WorkerPool
    forward: Callable[[int, ProbeLora], None]
    copy_s: Callable[[int], float]
    shapes: BaseShapes
    dtype: torch.dtype
    cuda: Any = None
    device: torch.device | str = "cpu"
    exchange: Exchange | None = None

    def slice_s(self, num_rows: int, rank: int, num_in: int, num_out: int) -> float:
        weights = GroupWeights(num_in, (rank,), (num_out,), (0,), (rank * num_in,))
        x, y = (torch.zeros(num_rows, width, dtype=self.dtype) for width in (num_in, num_out))
        with self.workers.session() as workers:
            return median_s(lambda: _round_trip(workers[0], weights, x, y))

    def wake_s(self) -> float:
        weights = GroupWeights(8, (1,), (8,), (0,), (8,))
        x, y = torch.zeros(2, 16, 8, dtype=self.dtype).unbind()
        extra = []
        for _ in range(REPEATS):
            time.sleep(0.01)  # workers fall asleep at the end of a session
            with self.workers.session() as workers:
                first_s, next_s = (timed_s(lambda: _round_trip(workers[0], weights, x, y)) for _ in range(2))
            extra.append(first_s - next_s)
        return statistics.median(extra)

    def layer_s(self, num_tokens: int) -> tuple[float, float]:
        watches: list[StopwatchLora | EventLora] = []

        def run() -> None:
            watches.append(StopwatchLora() if self.cuda is None else EventLora(self.cuda))
            self._forward(num_tokens, watches[-1])

        layer_s = median_s(run) / self.shapes.num_layers
        return layer_s, statistics.median(watch.gemm_s for watch in watches) / self.shapes.num_layers

    def _forward(self, num_tokens: int, lora: ProbeLora) -> None:
        """Returns when it is over."""
        self.forward(num_tokens, lora)
        if self.cuda is not None:
            self.cuda.current_stream().synchronize()

    def queue_s(self) -> tuple[float, float]:
        if self.cuda is None or self.exchange is None:
            return 0.0, 0.0
        layer_s = median_s(lambda: self.forward(1, StopwatchLora())) / self.shapes.num_layers
        self.cuda.current_stream().synchronize()
        num_in, num_out = self.shapes.sizes[MODULES.index("q_proj")]
        weights = GroupWeights(num_in, (1,), (num_out,), (0,), (num_in,))
        x, y = (
            torch.zeros(TYPICAL_TOKENS, width, dtype=self.dtype, device=self.device)
            for width in (num_in, num_out)
        )
        with self.exchange.session(AssistStats()) as workers:
            piece_s = median_s(lambda: _queue_pieces(self.exchange, workers, weights, x, y))  # type: ignore[arg-type]
        self.cuda.current_stream().synchronize()
        return layer_s, piece_s / NUM_QUEUED

    def slowdown(self, num_tokens: int) -> float:
        """1 where the device computes on no core."""
        if self.cuda is not None:
            return 1.0
        plain_s = self.layer_s(num_tokens)[0] * self.shapes.num_layers
        size_in, size_out = self.shapes.sizes[MODULES.index("q_proj")]
        weights = GroupWeights(size_in, (TYPICAL_RANK,), (size_out,), (0,), (TYPICAL_RANK * size_in,))
        busy = []
        with self.workers.session() as workers:
            for _ in range(REPEATS):
                lora = BusyLora(workers, weights)
                busy.append(timed_s(lambda context=lora: self.forward(num_tokens, context)) - lora.wait_s)  # type: ignore[misc]
        return statistics.median(busy) / plain_s


@dataclass
class _ProbeSource:
    """A `LoadSource` of one adapter whose every layer is the first bytes of the host arena."""

    layout: AdapterLayout
    view: Bytes
    num_layers_ready: int
    adapter_id: int = -1
    error: AdapterError | None = None

    def layer_view(self, layer: int) -> Bytes:
        return self.view[: self.layout.layer_bytes(layer)]


@dataclass(frozen=True)
class LinkProbe:
    """Times the loader itself, so that an emulated link is measured like a real one."""

    loader: Loader
    pool: DevicePool
    shapes: BaseShapes
    view: Bytes

    def __call__(self, num_bytes: int) -> float:
        """Seconds per layer block of `num_bytes`, scaled from smaller ones where these find no room.

        Raises ValueError where no adapter at all would find room.
        """
        dtype = self.pool.arena.dtype
        row_bytes = sum(self.shapes.sizes[0]) * dtype.itemsize
        room = min(self.pool.free_bytes, self.view.nbytes) - BLOCK_ALIGNMENT_BYTES
        rank = min(max(1, num_bytes // row_bytes), room // row_bytes)
        if rank < 1:
            raise ValueError(
                f"device pool ({self.pool.free_bytes} bytes) or host store ({self.view.nbytes}) have no room "
                f"for one layer of rank 1 ({row_bytes} bytes); raise device_pool_bytes or host_store_bytes"
            )
        num_loaded = min(self.shapes.num_layers, room // (rank * row_bytes + BLOCK_ALIGNMENT_BYTES) or 1)
        nothing = [0] * len(MODULES)
        ranks = [[rank, *nothing[1:]] if i < num_loaded else nothing for i in range(self.shapes.num_layers)]
        layout = AdapterLayout.build(ranks, self.shapes, str(dtype).removeprefix("torch."))
        slot = self.pool.try_place(layout)
        if slot is None:
            raise ValueError(f"no room for {layout.num_bytes} bytes in the device pool to measure the link")
        offsets = [self.pool.layer_offset(slot, layer) * dtype.itemsize for layer in range(layout.num_layers)]
        source = _ProbeSource(layout, self.view, layout.num_layers)
        load_s = median_s(lambda: self._load(source, offsets))
        self.pool.free(slot)
        return load_s / num_loaded * num_bytes / layout.layer_bytes(0)

    def _load(self, source: "_ProbeSource", offsets: list[int]) -> None:
        handle = self.loader.start(source, offsets)
        handle.wait_all()
        while not handle.done:  # on a GPU, queued and no more
            time.sleep(0)


def _queue_pieces(
    exchange: Exchange, workers: list[Worker], weights: GroupWeights, x: Tensor, y: Tensor
) -> None:
    for i in range(NUM_QUEUED if workers else 0):
        exchange.begin_group(workers)
        piece = Piece(0, x.shape[0], Form.FULL, weights, 0)
        exchange.post(workers[i % len(workers)], piece, x)
        y += exchange.take(piece, x)


def _round_trip(worker: Worker, weights: GroupWeights, x: Tensor, y: Tensor) -> None:
    worker.recycle()
    ticket = worker.try_post(Form.FULL, weights, x)
    if ticket is None or not worker.wait(ticket.number):
        raise RuntimeError("a LoRA worker failed while it was measured")
    y += ticket.result


def timed_s(action: Callable[[], None]) -> float:
    started_at = time.perf_counter()
    action()
    return time.perf_counter() - started_at


def median_s(action: Callable[[], None]) -> float:
    """After one call that is not counted."""
    action()
    return statistics.median(timed_s(action) for _ in range(REPEATS))
