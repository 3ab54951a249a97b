"""What these scripts share: options, engines, random adapters, this machine's limits, aims, the JSON line."""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from toppings.adapters.layout import DTYPE_BYTES
from toppings.adapters.registry import AdapterRecord
from toppings.config import EngineConfig
from toppings.engine.base import model_config, open_registry
from toppings.engine.engine import Engine
from toppings.engine.graphs import GraphBackend
from toppings.lab.aims import Aim
from toppings.lab.engines import running_engine
from toppings.lab.machine import describe_machine
from toppings.lab.random_adapters import register_random
from toppings.messages import AddRequest, RequestOutput
from toppings.model.config import ModelConfig
from toppings.model.weights import weight_shapes
from toppings.sampling_params import SamplingParams
from toppings.sources.models import DEMO
from toppings.synth import AdapterShape

CUDA: Any = torch.cuda
QKV = ("q_proj", "k_proj", "v_proj")
ALL_LINEAR = (*QKV, "o_proj", "gate_proj", "up_proj", "down_proj")
COPY_BYTES, HOST_COPY_BYTES, MATMUL_SIZE = 2**30, 2**28, 8192
TOY_COPY_BYTES, TOY_MATMUL_SIZE, TOY_CACHE_BYTES = 2**22, 128, 2**26
REPEATS, CALLS_AT_ONCE = 5, 8


# --- options and output ---


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every script has; `description`: its docstring."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-2-7b", help="a known shape, with random weights")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="the built-in model, small sizes: does it run?")
    return parser


@contextmanager
def noted(failures: dict[str, str], name: str) -> Iterator[None]:
    """An error within is printed and noted, for the sake of what else a run can still measure."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        failures[name] = repr(error)


def finish(
    benchmark: str,
    options: argparse.Namespace,
    aims: Sequence[Aim],
    *,
    failures: dict[str, str] | None = None,
    **result: Any,
) -> int:
    """Prints what was aimed for and, last, all of it as one JSON line; returns the exit status. An aim that
    is missed is a result, not a failure; `failures`: what could not be measured, and why."""
    for aim in aims:
        print(f"{'met   ' if aim.is_met else 'MISSED'} {aim.what}: {aim.value:.4g}, aim {aim.limit}")
    line = {
        **_subject(benchmark, options),
        "aims": [asdict(aim) for aim in aims],
        "failures": failures or {},
        **result,
        "machine": describe_machine(),
    }
    print(json.dumps(line))
    return 1 if failures else 0


def note(benchmark: str, options: argparse.Namespace, **so_far: Any) -> None:
    """After each case: what has been measured by now, as a JSON line of its own. The last line of a script
    that is stopped is its result."""
    line = {**_subject(benchmark, options), "is_partial": True, "aims": [], **so_far}
    print(json.dumps(line), flush=True)


def _subject(benchmark: str, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "model": "built-in" if options.toy else options.model,
        "device": CUDA.get_device_name() if options.device == "cuda" else "cpu",
        "is_toy": options.toy,
    }


def progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# --- limits of the machine, measured in the same run ---


def synchronize(device: str) -> None:
    if device == "cuda":
        CUDA.synchronize()


def timed_s(call: Callable[[], object], device: str) -> float:
    """Seconds until all that `call` queued is over."""
    synchronize(device)
    started_at = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started_at


def fastest_s(call: Callable[[], object], device: str) -> float:
    """What a limit is: of one call, where several are queued at once, in the best of a few rounds."""

    def several() -> None:
        for _ in range(CALLS_AT_ONCE):
            call()

    several()  # not counted
    return min(timed_s(several, device) for _ in range(REPEATS)) / CALLS_AT_ONCE


def copy_gbps(options: argparse.Namespace) -> float:
    """10^9 bytes read and written per second by a copy on the device."""
    free_device(options.device)
    size = TOY_COPY_BYTES if options.toy else COPY_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    return 2 * size / fastest_s(lambda: target.copy_(source), options.device) / 1e9


def matmul_tflops(options: argparse.Namespace) -> float:
    """10^12 operations per second of a square product in bfloat16 (the toy: in float32)."""
    free_device(options.device)
    size, dtype = (TOY_MATMUL_SIZE, torch.float32) if options.toy else (MATMUL_SIZE, torch.bfloat16)
    a, b = (torch.randn(size, size, device=options.device).to(dtype) for _ in range(2))
    return 2 * size**3 / fastest_s(lambda: a @ b, options.device) / 1e12


def host_copy_gbps(options: argparse.Namespace) -> float:
    """10^9 bytes per second from page-locked host memory to the device."""
    size = TOY_COPY_BYTES if options.toy else HOST_COPY_BYTES
    source = torch.ones(size, dtype=torch.uint8, pin_memory=options.device == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=options.device)
    return size / fastest_s(lambda: target.copy_(source, non_blocking=True), options.device) / 1e9


def step_bytes(model: ModelConfig, context_tokens: int) -> int:
    """What a decode step must read: every weight but the embeddings, and all contexts' keys and values."""
    weights = sum(prod(shape) for name, shape in weight_shapes(model).items() if name != "embed")
    if model.tie_word_embeddings:
        weights += model.vocab_size * model.hidden_size
    return DTYPE_BYTES[model.dtype] * (weights + 2 * model.num_layers * model.kv_size * context_tokens)


# --- engines ---


class Bench:
    """A state directory that is gone afterwards, random adapters in it, and engines one after another.

    `kind` names a group of adapters that are alike in their projections.
    """

    def __init__(self, options: argparse.Namespace, state_dir: str, **settings: Any) -> None:
        model: dict[str, Any] = {"model": options.model, "load_format": "dummy"}
        if options.toy:
            model = {"model": DEMO, "kv_cache_bytes": TOY_CACHE_BYTES, "num_threads": 1}
        self.options = options
        self.config = EngineConfig(
            device=options.device,
            state_dir=state_dir,
            **{"enable_prefix_caching": "off", **model, **settings},
        )
        self.model = model_config(self.config)
        self.kinds: dict[str, list[AdapterRecord]] = {}

    def register(
        self, kind: str, count: int, *, ranks: tuple[int, ...], targets: tuple[str, ...] = QKV
    ) -> None:
        """`count` adapters whose ranks are `ranks` in turn."""
        registry = open_registry(self.config)
        try:
            shape = AdapterShape(ranks=ranks, targets=targets)
            self.kinds[kind] = register_random(registry, shape, count, name=kind)
        finally:
            registry.close()

    def register_checkpoints(self, kind: str, paths: Sequence[Path]) -> None:
        """PEFT checkpoints, under the names of their directories."""
        registry = open_registry(self.config)
        try:
            self.kinds[kind] = [registry.register(path.name, path) for path in paths]
        finally:
            registry.close()

    @property
    def records(self) -> list[AdapterRecord]:
        return [record for records in self.kinds.values() for record in records]

    def ids(self, kind: str) -> list[int]:
        return [record.adapter_id for record in self.kinds[kind]]

    @property
    def adapter_bytes(self) -> int:
        """Of all adapters."""
        return sum(record.num_bytes for record in self.records)

    @contextmanager
    def engine(self, mode: str, *, graphs: GraphBackend | None = None, **settings: Any) -> Iterator[Engine]:
        """An engine with room for all adapters on host and device, unless `settings` say otherwise.

        What one engine had on the device is free again before the next is built.
        """
        free_device(self.options.device)
        room = max(self.adapter_bytes, 2**20) + 2**23
        config = replace(
            self.config,
            mode=mode,
            **{"device_pool_bytes": room, "host_store_bytes": room, **settings},
        )
        started_at = time.perf_counter()
        with running_engine(config, graphs=graphs) as engine:
            progress(f"{mode}: the engine is there after {time.perf_counter() - started_at:.1f} s")
            yield engine


def free_device(device: str) -> None:
    """Memory of an engine that is gone is free again."""
    gc.collect()
    if device == "cuda":
        CUDA.empty_cache()


@contextmanager
def open_bench(options: argparse.Namespace, **settings: Any) -> Iterator[Bench]:
    """`settings`: of every engine."""
    with tempfile.TemporaryDirectory(prefix="toppings-gpu-") as state_dir:
        yield Bench(options, state_dir, **settings)


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **more)


def random_prompt(seed: int, num_tokens: int) -> list[int]:
    """Of token ids that every vocabulary has."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(10, 256, (num_tokens,), generator=generator).tolist()
    return ids


def serve(engine: Engine, requests: Sequence[AddRequest]) -> dict[str, list[RequestOutput]]:
    """All outputs by request, the requests having come at once. Raises RuntimeError where one fails."""
    outputs: dict[str, list[RequestOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        if (refusal := engine.add(request)) is not None:
            raise RuntimeError(f"the engine refused request {request.request_id}: {refusal.error}")
    while engine.has_requests:
        for output in engine.step():
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id} failed: {output.error}")
            outputs[output.request_id].append(output)
        engine.poll()
    return outputs


def bring_to_device(engine: Engine, adapter_id: int) -> float:
    """Seconds until an adapter in host memory is on the device, where nobody uses it then."""
    adapters = engine.adapters
    started_at = time.perf_counter()
    while adapters.try_acquire(adapter_id, started_at).value != "ready":
        time.sleep(1e-4)
    load = adapters.load_of(adapter_id)
    if load is not None:
        load.wait_all()
    synchronize("cuda" if adapters.pool.arena.is_cuda else "cpu")
    elapsed = time.perf_counter() - started_at
    adapters.release(adapter_id)
    while adapters.load_of(adapter_id) is not None:
        adapters.poll()
    adapters.poll()
    return elapsed


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def read_json(file: Path) -> dict[str, Any] | None:
    """None where a script ended without a result."""
    with suppress(OSError, ValueError):
        content: dict[str, Any] = json.loads(file.read_text())
        return content
    return None
