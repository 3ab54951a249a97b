"""CPU assistance as one engine uses it: its workers, its cold-start profile, its coordinator."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from toppings.adapters.layout import BaseShapes
from toppings.adapters.loader import LoadHandle
from toppings.adapters.manager import AdapterManager
from toppings.assist.coordinator import AssistLora, ColdAdapter, Coordinator
from toppings.assist.cores import WorkerCores, available_cores, choose_cores
from toppings.assist.cost import CostProfile
from toppings.assist.cuda_stream_ops import CudaStreamOps
from toppings.assist.exchange import Exchange, HostExchange
from toppings.assist.modes import AssistMode
from toppings.assist.pool import NUM_SLOTS, NoWorkersError, PoolSettings, WorkerPool
from toppings.assist.profile import SLICE_ROWS, EngineProbes, LinkProbe, measure
from toppings.assist.stream_exchange import MAX_STREAM_ROWS, NUM_STREAM_SLOTS, StreamExchange, StreamOps
from toppings.config import EngineConfig
from toppings.core import GROUPS
from toppings.engine.model_runner import ModelRunner
from toppings.ops.lora import LoraSegments

logger = logging.getLogger(__name__)

MAX_PROFILE_TOKENS = 512
GPU_ENGINE_THREADS = 2
"""Cores that an engine on a GPU keeps for itself: its own thread, and those that read and load."""
_AREA_SLACK_BYTES = 1 << 16  # pieces begin on cache lines


class Assist:
    """To be made and used by the thread that runs the engine: the workers end with it."""

    def __init__(
        self,
        config: EngineConfig,
        mode: AssistMode,
        adapters: AdapterManager,
        runner: ModelRunner,
        state_dir: Path,
        *,
        stream_ops: StreamOps | None = None,
    ) -> None:
        """`stream_ops`: where the device is not the host, by default CUDA's on a GPU.

        Raises ValueError for worker cores that are not there, or a profile file that is none; NoWorkersError.
        """
        self._mode = mode
        self._is_cuda = config.device == "cuda"
        self._adapters = adapters
        dtype, shapes = adapters.pool.arena.dtype, adapters.shapes
        stream_ops = stream_ops or (CudaStreamOps() if self._is_cuda else None)
        max_rows = max(config.max_num_batched_tokens, *SLICE_ROWS)
        if stream_ops is not None:  # all of it is page-locked
            max_rows = min(max_rows, MAX_STREAM_ROWS)
        row_bytes = [max_rows * width * dtype.itemsize for width in widest(shapes)]
        self._workers = WorkerPool(
            PoolSettings(
                cores=worker_cores(config),
                arena_fd=adapters.host.arena.fd,
                arena_bytes=adapters.host.arena.size_bytes,
                dtype=dtype,
                max_input_bytes=row_bytes[0] + _AREA_SLACK_BYTES,
                max_output_bytes=row_bytes[1] + _AREA_SLACK_BYTES,
                num_slots=NUM_SLOTS if stream_ops is None else NUM_STREAM_SLOTS,
                is_ordered=stream_ops is not None,
            )
        )
        host_arena = torch.from_numpy(adapters.host.arena.view).view(dtype)
        self._exchange: Exchange = HostExchange(self._workers, host_arena)
        if stream_ops is not None:
            self._exchange = self._stream_exchange(host_arena, stream_ops)
        try:
            self.profile = self._read_or_measure(profile_path(config, state_dir), runner)
        except NoWorkersError:
            self.close()
            raise
        mode.calibrate(self.profile)
        self._coordinator = Coordinator(
            adapters.pool,
            self._workers,
            self._exchange,
            dtype.itemsize,
            runner.out_offsets,
            self.profile,
            host_arena,
        )

    def _stream_exchange(self, host_arena: torch.Tensor, ops: StreamOps) -> StreamExchange:
        exchange = StreamExchange(self._workers, host_arena, ops)
        try:
            exchange.lock()  # now, lest the first cold request waits for it
        except RuntimeError as error:
            self._workers.close()
            raise NoWorkersError(f"the workers' memory cannot be page-locked: {error}") from error
        return exchange

    def step(
        self, segments: LoraSegments, loads: Mapping[int, LoadHandle], num_tokens: Mapping[int, int]
    ) -> AssistLora:
        """The context of a forward with `num_tokens` rows of adapters whose `loads` were under way when it
        began, both by adapter id. A load may have landed since."""
        cold = [self._cold(a, load, num_tokens[a]) for a, load in loads.items()]
        return self._coordinator.step(segments, cold)

    def _cold(self, adapter_id: int, load: LoadHandle, num_tokens: int) -> ColdAdapter:
        entry = self._adapters.host_entry_of(adapter_id)
        choices = self._mode.plan(entry.layout, num_tokens).choices
        return ColdAdapter(adapter_id, self._adapters.slot_of(adapter_id), load, entry, choices)

    def poll(self) -> None:
        """Replaces workers that died while nothing ran."""
        self._workers.restart_dead()

    @property
    def num_workers(self) -> int:
        """Processes that are alive."""
        return len(self._workers.pids)

    def counters(self) -> dict[str, float]:
        return {
            "assist_recomputed_slices": self._exchange.num_recomputed,
            "assist_worker_restarts": self._workers.num_restarts,
        }

    def close(self) -> None:
        self._exchange.close()
        self._workers.close()

    def _read_or_measure(self, path: Path, runner: ModelRunner) -> CostProfile:
        if path.exists():
            return CostProfile.read(path)
        logger.info("measuring what a cold start costs here")
        self._workers.wait_ready()
        profile = self._measure(runner)
        if len(self._workers.pids) < len(self._workers.settings.cores.cores):
            return profile  # the next start may have all of them
        try:
            profile.write(path)
        except OSError as error:
            logger.warning("what a cold start costs is not kept, and will be measured again: %s", error)
        return profile

    def _measure(self, runner: ModelRunner) -> CostProfile:
        pool, shapes = self._adapters.pool, self._adapters.shapes
        link = LinkProbe(self._adapters.loader, pool, shapes, self._adapters.host.arena.view)
        probes = EngineProbes(
            self._workers,
            runner.dry_run,
            link,
            shapes,
            pool.arena.dtype,
            cuda=torch.cuda if self._is_cuda else None,
            device=pool.arena.device,
            exchange=self._exchange,
        )
        return measure(
            probes,
            shapes,
            num_workers=len(self._workers.pids),
            origin=f"measured on {self._workers.settings.cores}",
            max_tokens=min(MAX_PROFILE_TOKENS, runner.max_dry_run_tokens),
            has_results_on_link=self._is_cuda,
        )


def widest(shapes: BaseShapes) -> tuple[int, int]:
    """(inputs, outputs) of a row in the widest projection group of each: a channel holds one at a time."""
    sizes = shapes.sizes
    return (
        max(num_in for num_in, _ in sizes),
        max(sum(sizes[module][1] for module in modules) for modules in GROUPS.values()),
    )


def worker_cores(config: EngineConfig) -> WorkerCores:
    """Depends on torch's number of threads. Raises ValueError for cores that are not there."""
    return choose_cores(
        available_cores(),
        GPU_ENGINE_THREADS if config.device == "cuda" else torch.get_num_threads(),
        num_workers=config.assist_workers,
        cores=tuple(map(int, config.assist_cores)),
    )


def profile_path(config: EngineConfig, state_dir: Path) -> Path:
    """One file for each set of settings, threads and cores that the figures depend on."""
    cores = worker_cores(config)
    workers = "-".join(config.assist_cores) or str(len(cores.cores))
    threads = torch.get_num_threads()
    sharing = "shared" if cores.is_shared else "free"
    stored = "" if config.quantization == "none" else f"-{config.quantization}"
    parts = (config.device, f"{config.dtype}{stored}", f"link{config.link_gbps:g}", f"threads{threads}")
    return state_dir / f"cold-start-{'-'.join(parts)}-workers{workers}-{sharing}.json"
