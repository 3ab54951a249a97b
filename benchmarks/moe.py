"""A mixture of experts on the CPU: Toppings and transformers on one random Qwen3-MoE-like checkpoint, in
turns, each in a process of its own, and what LoRA on the experts costs a step.

    python benchmarks/moe.py          # 340 M parameters in bf16, 16 experts, 4 for a token: some minutes
    python benchmarks/moe.py --toy    # a tiny model: does the script still work?

Requests have prompts of one length and are greedy. `tokens_per_s`: all tokens over all of the time, prompts
included, by the clock (`clock`) and by the process's processor time (`processor`), which other work on the
machine disturbs less, most of all with `--threads 1`. `step_ms`: the median of our decode steps in which all
requests run. `lora_step_over_plain`: with an adapter of its own for each request, on attention alone
(`attention`) or on the experts as well (`experts`), over the step of as many requests without. Figures are
medians over rounds in which all cases are measured one after the other. Ends in one JSON line.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from toppings.config import EngineConfig
from toppings.engine.base import open_registry
from toppings.lab.child import Child, child
from toppings.lab.engines import running_engine
from toppings.lab.script import finish, make_parser, parse
from toppings.lab.transformers_side import generate
from toppings.messages import AddRequest
from toppings.sampling_params import SamplingParams

NUM_REQUESTS = 8
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Scale:
    hidden: int
    num_layers: int
    num_experts: int
    num_per_token: int
    expert_size: int
    vocab_size: int
    dtype: str
    rank: int
    num_prompt: int
    num_tokens: int
    num_rounds: int

    @property
    def num_heads(self) -> int:
        return self.hidden // 64

    def config(self) -> Any:
        return AutoConfig.for_model(
            "qwen3_moe",
            hidden_size=self.hidden,
            intermediate_size=self.expert_size,
            moe_intermediate_size=self.expert_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=max(1, self.num_heads // 4),
            head_dim=64,
            num_experts=self.num_experts,
            num_experts_per_tok=self.num_per_token,
            norm_topk_prob=True,
            vocab_size=self.vocab_size,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
        )


FULL = Scale(1024, 12, 16, 4, 512, 8000, "bfloat16", 16, 128, 32, 5)
TOY = Scale(64, 2, 8, 2, 32, 320, "float32", 4, 8, 3, 1)


def write_checkpoint(path: Path, scale: Scale) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(scale.config()).to(getattr(torch, scale.dtype))
    model.save_pretrained(path)


def write_adapter(path: Path, scale: Scale, seed: int, *, has_experts: bool) -> None:
    """As PEFT writes it, with small random weights; on the experts by `target_parameters`."""
    generator = torch.Generator().manual_seed(seed)
    hidden, size, rank, num = scale.hidden, scale.expert_size, scale.rank, scale.num_experts
    width, kv_width = 64 * scale.num_heads, 64 * max(1, scale.num_heads // 4)
    outs = (width, kv_width, kv_width, hidden)
    tensors: dict[str, torch.Tensor] = {}

    def add(key: str, num_in: int, num_out: int, num_ranks: int) -> None:
        for half, shape in (("A", (num_ranks, num_in)), ("B", (num_out, num_ranks))):
            values = 0.02 * torch.randn(shape, generator=generator)
            tensors[f"base_model.model.{key}.lora_{half}.weight"] = values.to(getattr(torch, scale.dtype))

    for layer in range(scale.num_layers):
        prefix = f"model.layers.{layer}."
        for name, num_out in zip(ATTENTION, outs, strict=True):
            add(f"{prefix}self_attn.{name}", width if name == "o_proj" else hidden, num_out, rank)
        if has_experts:
            add(f"{prefix}mlp.experts.base_layer", hidden, 2 * size, rank * num)
            add(f"{prefix}mlp.experts", size, hidden, rank * num)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(ATTENTION)}
    if has_experts:
        config["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")


Seconds = tuple[float, float]
"""By the clock, and of processors."""
Side = dict[str, Callable[[], Seconds | None]]
"""What to time, by case; what it returns is the median decode step, where it knows."""
MakeSide = Callable[[Path, Scale, int], AbstractContextManager[Side]]
Answer = tuple[Seconds, Seconds | None]


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(start: Seconds) -> Seconds:
    wall, cpu = now()
    return wall - start[0], cpu - start[1]


def medians(samples: Iterable[Seconds]) -> Seconds:
    walls, cpus = zip(*samples, strict=True)
    return statistics.median(walls), statistics.median(cpus)


class Timed:
    """A side of which is asked a case: its seconds, and those of a decode step."""

    def __init__(self, calls: Side) -> None:
        self._calls = calls

    def ask(self, case: str) -> Answer:
        start = now()
        step = self._calls[case]()
        return since(start), step


def serve(pipe: Connection, make: MakeSide, directory: Path, scale: Scale, num_threads: int) -> None:
    """Answers what the pipe asks for, until that is None."""
    with make(directory, scale, num_threads) as calls:
        pipe.send("ready")
        while (question := pipe.recv()) is not None:
            pipe.send(Timed(calls).ask(question))


@contextmanager
def ours(directory: Path, scale: Scale, num_threads: int) -> Iterator[Side]:
    config = EngineConfig(
        model=str(directory / "model"),
        state_dir=str(directory / "state"),
        kv_cache_bytes=256 * 2**20,
        device_pool_bytes=512 * 2**20,
        enable_prefix_caching="off",
        mode="on_demand",
        step_log="off",
        num_threads=num_threads,
    )
    registry = open_registry(config)
    ids = {
        kind: [registry.register(path.name, path).adapter_id for path in sorted((directory / kind).iterdir())]
        for kind in ("attention", "experts")
    }
    registry.close()
    with running_engine(config) as engine:

        def answer(num_requests: int, adapters: Sequence[int] | None) -> Seconds:
            sampling = SamplingParams(max_tokens=scale.num_tokens, temperature=0.0, ignore_eos=True)
            for i in range(num_requests):
                adapter_id = None if adapters is None else adapters[i % len(adapters)]
                assert engine.add(AddRequest(str(i), prompt(i, scale), sampling, adapter_id)) is None
            drawn, steps = dict.fromkeys(map(str, range(num_requests)), 0), []
            while engine.has_requests:
                is_decode, start = min(drawn.values()) > 0, now()
                for output in engine.step():
                    assert output.error is None, output.error
                    drawn[output.request_id] += len(output.token_ids)
                if is_decode:
                    steps.append(since(start))
            assert set(drawn.values()) == {scale.num_tokens}
            return medians(steps)

        yield {
            "one": lambda: answer(1, None),
            "one_experts": lambda: answer(1, ids["experts"]),
            "eight": lambda: answer(NUM_REQUESTS, None),
            "eight_attention": lambda: answer(NUM_REQUESTS, ids["attention"]),
            "eight_experts": lambda: answer(NUM_REQUESTS, ids["experts"]),
        }


@contextmanager
def theirs(directory: Path, scale: Scale, num_threads: int) -> Iterator[Side]:
    torch.set_num_threads(num_threads)
    model = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    batch = [prompt(i, scale) for i in range(NUM_REQUESTS)]

    def answer(num_requests: int) -> None:
        generate(model, batch[:num_requests], scale.num_tokens)

    yield {"one": lambda: answer(1), "eight": lambda: answer(NUM_REQUESTS)}


def prompt(seed: int, scale: Scale) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(10, scale.vocab_size, (scale.num_prompt,), generator=generator).tolist()
    return ids


CASES = {
    "ours": ("one", "one_experts", "eight", "eight_attention", "eight_experts"),
    "transformers": ("one", "eight"),
}
CLOCKS = ("clock", "processor")
Times = dict[tuple[str, str], Answer]
"""Medians, by side and case."""


def measure(sides: Mapping[str, Child | Timed], scale: Scale) -> Times:
    samples: dict[tuple[str, str], list[Answer]] = {}
    for number in range(scale.num_rounds + 1):  # the first round warms up
        for case in CASES["ours"]:
            for name, side in sides.items():
                if case in CASES[name]:
                    answer = side.ask(case)
                    if number:
                        samples.setdefault((name, case), []).append(answer)
    return {
        key: (
            medians(total for total, _ in answers),
            medians(step for _, step in answers if step) if answers[0][1] else None,
        )
        for key, answers in samples.items()
    }


def report(times: Times, scale: Scale) -> dict[str, Any]:
    def of_case(side: str, case: str) -> dict[str, Any]:
        total, step = times[side, case]
        num_tokens = scale.num_tokens * (NUM_REQUESTS if case.startswith("eight") else 1)
        rates = {clock: num_tokens / each for clock, each in zip(CLOCKS, total, strict=True)}
        found: dict[str, Any] = {"tokens_per_s": rates}
        if step is not None:
            found["step_ms"] = {clock: each * 1e3 for clock, each in zip(CLOCKS, step, strict=True)}
        return found

    result: dict[str, Any] = {
        side: {case: of_case(side, case) for case in cases} for side, cases in CASES.items()
    }
    mine, other = result["ours"], result["transformers"]
    result["tokens_per_s_over_transformers"] = {
        case: {c: mine[case]["tokens_per_s"][c] / other[case]["tokens_per_s"][c] for c in CLOCKS}
        for case in CASES["transformers"]
    }
    pairs = (("one_experts", "one"), ("eight_attention", "eight"), ("eight_experts", "eight"))
    result["lora_step_over_plain"] = {
        case: {c: mine[case]["step_ms"][c] / mine[plain]["step_ms"][c] for c in CLOCKS}
        for case, plain in pairs
    }
    return result


def machine(num_threads: int) -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    flags = [flag for flag in found.get("flags", "").split() if flag.startswith(("avx2", "avx512", "amx"))]
    return {
        "cpu": found.get("model name", platform.machine()),
        "flags": flags,
        "cores": len(os.sched_getaffinity(0)),
        "threads": num_threads,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = make_parser(__doc__, "a tiny model and few tokens")
    parser.add_argument("--rounds", type=int, default=FULL.num_rounds, help="rounds to take the median of")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each side")
    args = parse(parser)
    scale = TOY if args.toy else replace(FULL, num_rounds=args.rounds)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        directory = Path(name)
        write_checkpoint(directory / "model", scale)
        for kind in ("attention", "experts"):
            for i in range(NUM_REQUESTS):
                path = directory / kind / f"{kind}-{i}"
                write_adapter(path, scale, i, has_experts=kind == "experts")
        sides: dict[str, Child | Timed] = {
            side: Timed(stack.enter_context(make(directory, scale, args.threads)))
            if args.toy
            else stack.enter_context(child(serve, make, directory, scale, args.threads))
            for side, make in (("ours", ours), ("transformers", theirs))
        }
        result = report(measure(sides, scale), scale)
    finish(args, "moe", machine=machine(args.threads), scale=vars(scale), **result)


if __name__ == "__main__":
    main()
