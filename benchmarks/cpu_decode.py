"""What a token of one request takes on this CPU, with the weights in bf16, int8 and int4, against the floor.

    python benchmarks/cpu_decode.py                       # 211 M parameters, random: a minute or two
    python benchmarks/cpu_decode.py --model SMOLLM        # as toppings serve takes it
    python benchmarks/cpu_decode.py --toy

An engine for each number of bits, all in this process, one request at a time; requests take turns. The floor
of a token is the bytes of the weights that it reads over the read bandwidth that as many threads have in the
same turns, from huge pages as the weights. `tpt_ms`: the median of a request's decode steps, of which the
least disturbed request counts;
`cpu_ms`: the processor time of a step, which with --threads 1 other work on the machine disturbs less
(threads that wait for each other take some, too), and `cpu_over_floor`, with the processor time of reading;
`recorded_ms`: of it, the model's forward where it is recorded: the rest is the scheduler, the inputs and the
draw. To hold all to AVX2 on a CPU that has more, set ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2,
NUMBA_CPU_NAME=x86-64-v3 and an empty NUMBA_CPU_FEATURES. Ends in one JSON line.
"""

import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from toppings.config import QUANTIZATIONS, EngineConfig
from toppings.engine.engine import Engine
from toppings.engine.graphs import Graph
from toppings.engine.host_graphs import HostGraphs
from toppings.lab.engines import running_engine
from toppings.lab.machine import describe_machine
from toppings.lab.script import finish, make_parser, parse
from toppings.messages import AddRequest
from toppings.model.decoder import Decoder
from toppings.ops.huge_pages import use_huge_pages
from toppings.ops.linear import QuantizedLinear
from toppings.sampling_params import SamplingParams
from toppings.sources.models import find_model
from toppings.synth import PRESETS, write_model

NUM_PROMPT = 128
READ_ELEMENTS = 2**26
CACHE_BYTES = 128 * 2**20


@dataclass
class Times:
    """Of each turn, in ms."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    recorded: list[float] = field(default_factory=list)


class Recorded:
    """A recording whose processor time is counted."""

    spent_ns = 0

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def replay(self) -> None:
        before = time.process_time_ns()
        self._graph.replay()
        Recorded.spent_ns += time.process_time_ns() - before


def count_recorded(engine: Engine) -> None:
    capture = HostGraphs.capture
    for graphs in engine._runner.graphs:  # type: ignore[attr-defined]
        graphs._backend.capture = lambda run, of=graphs._backend: Recorded(capture(of, run))


def decode(engine: Engine, name: str, num_tokens: int, times: Times) -> None:
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    assert engine.add(AddRequest(name, list(range(3, 3 + NUM_PROMPT)), sampling, is_cacheable=False)) is None
    while not any(output.token_ids for output in engine.step()):
        pass
    walls, cpu, recorded = [], time.process_time_ns(), Recorded.spent_ns
    while engine.has_requests:
        started_at = time.perf_counter()
        engine.step()
        walls.append(1e3 * (time.perf_counter() - started_at))
    times.wall.append(statistics.median(walls))
    times.cpu.append((time.process_time_ns() - cpu) / len(walls) / 1e6)
    times.recorded.append((Recorded.spent_ns - recorded) / len(walls) / 1e6)


def read_gbps(data: torch.Tensor) -> tuple[float, float]:
    """By the clock, and by processor time."""
    started_at, cpu = time.perf_counter(), time.process_time()
    data.sum()
    spans = time.perf_counter() - started_at, time.process_time() - cpu
    return data.nbytes / spans[0] / 1e9, data.nbytes / spans[1] / 1e9


def weight_bytes(engine: Engine) -> int:
    """What a token reads of the weights: all products', the output layer's with them."""
    decoder: Decoder = engine._runner._decoder  # type: ignore[attr-defined]
    return sum(
        product.weight.nbytes
        if isinstance(product, QuantizedLinear)
        else product.num_in * product.num_out * decoder.dtype.itemsize
        for product in decoder.products()
    )


def run(model: str, state_dir: Path, num_tokens: int, num_rounds: int, num_threads: int) -> dict[str, Any]:
    data = torch.ones(READ_ELEMENTS)
    use_huge_pages([(data.data_ptr(), data.data_ptr() + data.nbytes)])  # as weights
    data.sum()
    engines: dict[str, Engine] = {}
    times, reads = {name: Times() for name in QUANTIZATIONS}, []
    with ExitStack() as stack:
        for name in QUANTIZATIONS:
            config = EngineConfig(
                model=model, state_dir=str(state_dir), quantization=name, kv_cache_bytes=CACHE_BYTES,
                num_threads=num_threads, step_log="off",
            )  # fmt: skip
            engines[name] = stack.enter_context(running_engine(config))
            count_recorded(engines[name])
            decode(engines[name], "warm-up", 4, Times())
        num_bytes = {name: weight_bytes(engine) for name, engine in engines.items()}
        for turn in range(num_rounds):
            for name, engine in engines.items():
                reads.append(read_gbps(data))
                decode(engine, f"{turn}", num_tokens, times[name])
    gbps, cpu_gbps = (max(each) for each in zip(*reads, strict=True))
    result: dict[str, Any] = {"read_gbps": gbps, "threads": torch.get_num_threads(), "forms": {}}
    base = min(times["none"].wall), min(times["none"].cpu)
    for name, each in times.items():
        floor_ms, cpu_floor_ms = (num_bytes[name] / each / 1e6 for each in (gbps, cpu_gbps))
        wall, cpu = min(each.wall), min(each.cpu)
        result["forms"][name] = {
            "tpt_ms": wall, "cpu_ms": cpu, "recorded_ms": min(each.recorded), "floor_ms": floor_ms,
            "over_floor": wall / floor_ms, "over_bf16": wall / base[0],
            "cpu_over_floor": cpu / cpu_floor_ms, "cpu_over_bf16": cpu / base[1],
        }  # fmt: skip
    return result


def main() -> None:
    parser = make_parser(__doc__, "a tiny model and few tokens")
    parser.add_argument(
        "--model", default="", help="as toppings serve takes it; else 211 M random parameters"
    )
    parser.add_argument("--tokens", type=int, default=48, help="of a request")
    parser.add_argument("--rounds", type=int, default=5, help="requests of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="that compute")
    args = parse(parser)
    if args.toy:
        args.tokens, args.rounds = 4, 1
    with tempfile.TemporaryDirectory() as directory:
        if args.model:
            model = str(find_model(args.model).path)
        else:
            model = str(Path(directory) / "model")
            write_model(Path(model), PRESETS["tiny" if args.toy else "small-211m"])
        result = run(model, Path(directory) / "state", args.tokens, args.rounds, args.threads)
    finish(args, "cpu_decode", **result, machine=describe_machine())


if __name__ == "__main__":
    main()
