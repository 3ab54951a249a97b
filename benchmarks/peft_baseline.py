"""Toppings and transformers + PEFT on one checkpoint, in turns, each in a process of its own.

    python benchmarks/peft_baseline.py          # 211 M parameters in bf16: some minutes
    python benchmarks/peft_baseline.py --toy    # a tiny model: does the script still work?

Each figure is the median over rounds in which both sides are measured one after the other. A request's first
token takes the time of a request for one token; decode TPT is what every further token adds. The floor of a
decode step is the bytes it reads (each weight once) over the read bandwidth measured in the same run.
Ends in one JSON line.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from toppings import LLM, SamplingParams
from toppings.lab.child import Child, child
from toppings.lab.script import finish, make_parser, parse
from toppings.lab.transformers_side import generate
from toppings.synth import PRESETS, AdapterShape, write_adapters, write_model

NUM_ADAPTERS = 8
NUM_PROMPT = 128
NUM_LONG_PROMPT = 512
READ_BYTES = 512 * 2**20


def main() -> None:
    parser = make_parser(__doc__, "a tiny model and few tokens")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take the median of")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    args = parse(parser)
    if args.toy:
        args.rounds, args.tokens = 1, 4
    with tempfile.TemporaryDirectory() as directory:
        result = run(Path(directory), "tiny" if args.toy else "small-211m", args.rounds, args.tokens)
    finish(args, "peft_baseline", **result)


def run(directory: Path, preset: str, num_rounds: int, num_tokens: int) -> dict[str, Any]:
    model, adapters = directory / "model", directory / "adapters"
    write_model(model, PRESETS[preset])
    write_adapters(adapters, model, AdapterShape(dtype=PRESETS[preset].dtype), count=NUM_ADAPTERS)
    paths = sorted(adapters.iterdir())
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(child(serve, make, model, paths))
            for name, make in (("ours", ours), ("peft", peft))
        }
        times = measure(sides, num_rounds, num_tokens)
    return report(times, num_tokens, sum(f.stat().st_size for f in model.glob("*.safetensors")))


Side = dict[str, Callable[[int], object]]
"""What to time, by case: each takes the number of tokens to generate."""


def serve(pipe: Connection, make: Callable[[Path, list[Path]], Side], model: Path, paths: list[Path]) -> None:
    """Times what the pipe asks for, until that is None. In a process of its own: two teams of OpenMP threads
    in one process slow each other down."""
    calls = make(model, paths)
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        case, num_tokens = request
        started_at = time.perf_counter()
        calls[case](num_tokens)
        pipe.send(time.perf_counter() - started_at)


def ours(model: Path, paths: list[Path]) -> Side:
    settings = {"kv_cache_bytes": "512MiB", "enable_prefix_caching": "off"}
    llm = LLM(model, state_dir=str(model.parent / "state"), **settings)
    for path in paths:
        llm.load_adapter(path.name, path)
    names = [path.name for path in paths]

    def answer(prompts: list[list[int]], adapter: Sequence[str | None] | None, num: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True)
        completions = llm.generate(prompts, sampling, adapter=adapter)
        assert all(len(c.token_ids) == num for c in completions)

    batch = [prompt(i) for i in range(NUM_ADAPTERS)]
    return {
        "one": lambda num: answer([prompt(0)], None, num),
        "eight": lambda num: answer(batch, None, num),
        "eight_adapters": lambda num: answer(batch, names, num),
        "long": lambda _: answer([prompt(0, NUM_LONG_PROMPT)], None, 1),
    }


def peft(model: Path, paths: list[Path]) -> Side:
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), paths[0], paths[0].name)
    for path in paths[1:]:
        adapted.load_adapter(path, path.name)
    adapted.eval()

    batch, names = [prompt(i) for i in range(NUM_ADAPTERS)], [path.name for path in paths]
    return {
        "one": lambda num: generate(base, [prompt(0)], num),
        "eight": lambda num: generate(base, batch, num),
        "eight_adapters": lambda num: generate(adapted, batch, num, names),
        "long": lambda _: generate(base, [prompt(0, NUM_LONG_PROMPT)], 1),
    }


def prompt(seed: int, num_tokens: int = NUM_PROMPT) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(10, 500, (num_tokens,), generator=generator).tolist()
    return ids


Times = dict[tuple[str, str, int], float]
"""Median seconds by side, case and number of tokens."""


def measure(sides: dict[str, Child], num_rounds: int, num_tokens: int) -> Times:
    samples: dict[tuple[str, str, int], list[float]] = {}
    for number in range(num_rounds + 1):  # the first round warms up
        for case in ("one", "eight", "eight_adapters", "long"):
            for num in (1, num_tokens) if case != "long" else (1,):
                for name, side in sides.items():
                    elapsed = side.ask((case, num))
                    if number:
                        samples.setdefault((name, case, num), []).append(elapsed)
    return {key: statistics.median(values) for key, values in samples.items()}


def read_gbps() -> float:
    """Read bandwidth in 10^9 bytes per second: the best of a few sums over memory larger than any cache."""
    data = torch.ones(READ_BYTES // 4)
    times = []
    for _ in range(7):
        started_at = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - started_at)
    return READ_BYTES / min(times) / 1e9


def report(times: Times, num_tokens: int, weight_bytes: int) -> dict[str, Any]:
    def tpt(side: str, case: str) -> float:
        return (times[side, case, num_tokens] - times[side, case, 1]) / (num_tokens - 1)

    def rate(side: str, case: str) -> float:
        return NUM_ADAPTERS * num_tokens / times[side, case, num_tokens]

    gbps = read_gbps()
    floor_ms = weight_bytes / gbps / 1e6
    result: dict[str, Any] = {"threads": torch.get_num_threads()}
    for side in ("ours", "peft"):
        result[side] = {
            "one_ttft_ms": times[side, "one", 1] * 1e3,
            "one_tpt_ms": tpt(side, "one") * 1e3,
            "eight_tokens_per_s": rate(side, "eight"),
            "eight_adapters_tokens_per_s": rate(side, "eight_adapters"),
            "eight_step_ms": tpt(side, "eight") * 1e3,
            "eight_adapters_step_ms": tpt(side, "eight_adapters") * 1e3,
            "prefill_512_ms": times[side, "long", 1] * 1e3,
        }
    mine, theirs = result["ours"], result["peft"]
    result["ratios"] = {
        "one_tpt": mine["one_tpt_ms"] / theirs["one_tpt_ms"],
        "eight_adapters_tokens_per_s": mine["eight_adapters_tokens_per_s"]
        / theirs["eight_adapters_tokens_per_s"],
        "step_with_over_without_adapters": mine["eight_adapters_step_ms"] / mine["eight_step_ms"],
        "prefill_512": mine["prefill_512_ms"] / theirs["prefill_512_ms"],
        "one_tpt_over_floor": mine["one_tpt_ms"] / floor_ms,
    }
    result["limits"] = {
        "read_gbps": gbps,
        "one_tpt_floor_ms": floor_ms,
        "achieved_read_gbps": weight_bytes / mine["one_tpt_ms"] / 1e6,
    }
    return result


if __name__ == "__main__":
    main()
