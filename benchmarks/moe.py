"""A mixture of experts on the CPU: Toppings and transformers on one random Qwen3-MoE-like checkpoint, in
turns, each in a process of its own, and what LoRA on the experts costs a step.

    python benchmarks/moe.py          # 340 M parameters in bf16, 16 experts, 4 for a token: some minutes
    python benchmarks/moe.py --toy    # a tiny model: does the script still work?

Requests have prompts of one length and are greedy. A decode step takes what every token after the first adds;
`tokens_per_s` is all of a request's tokens over all of its time. `lora`: eight requests, each with an adapter
of its own, on attention alone (`attention`) and on the experts as well (`experts`); ratios are to the step of
as many requests without adapters. Each figure is the median over rounds in which all cases are measured one
after the other. `processor_s`: of the process and its threads, which other work on the machine disturbs less.
Ends in one JSON line.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


Side = dict[str, Callable[[int], object]]
"""What to time, by case: each takes the number of tokens to generate."""
MakeSide = Callable[[Path, Scale], AbstractContextManager[Side]]


class Timed:
    """A side of which is asked (case, number of tokens): seconds by the clock and of processors."""

    def __init__(self, calls: Side) -> None:
        self._calls = calls

    def ask(self, question: tuple[str, int]) -> tuple[float, float]:
        case, num_tokens = question
        wall, cpu = time.perf_counter(), time.process_time()
        self._calls[case](num_tokens)
        return time.perf_counter() - wall, time.process_time() - cpu


def serve(pipe: Connection, make: MakeSide, directory: Path, scale: Scale) -> None:
    """Answers what the pipe asks for, until that is None."""
    with make(directory, scale) as calls:
        pipe.send("ready")
        while (question := pipe.recv()) is not None:
            pipe.send(Timed(calls).ask(question))


@contextmanager
def ours(directory: Path, scale: Scale) -> Iterator[Side]:
    config = EngineConfig(
        model=str(directory / "model"),
        state_dir=str(directory / "state"),
        kv_cache_bytes=256 * 2**20,
        device_pool_bytes=512 * 2**20,
        enable_prefix_caching="off",
        mode="on_demand",
        step_log="off",
    )
    registry = open_registry(config)
    ids = {
        kind: [registry.register(path.name, path).adapter_id for path in sorted((directory / kind).iterdir())]
        for kind in ("attention", "experts")
    }
    registry.close()
    with running_engine(config) as engine:

        def answer(num_requests: int, adapters: Sequence[int] | None, num: int) -> None:
            sampling, drawn = SamplingParams(max_tokens=num, temperature=0.0, ignore_eos=True), 0
            for i in range(num_requests):
                adapter_id = None if adapters is None else adapters[i % len(adapters)]
                assert engine.add(AddRequest(str(i), prompt(i, scale), sampling, adapter_id)) is None
            while engine.has_requests:
                for output in engine.step():
                    assert output.error is None, output.error
                    drawn += len(output.token_ids)
            assert drawn == num_requests * num

        yield {
            "one": lambda num: answer(1, None, num),
            "one_experts": lambda num: answer(1, ids["experts"][:1], num),
            "eight": lambda num: answer(NUM_REQUESTS, None, num),
            "eight_attention": lambda num: answer(NUM_REQUESTS, ids["attention"], num),
            "eight_experts": lambda num: answer(NUM_REQUESTS, ids["experts"], num),
        }


@contextmanager
def theirs(directory: Path, scale: Scale) -> Iterator[Side]:
    model = AutoModelForCausalLM.from_pretrained(directory / "model").eval()
    batch = [prompt(i, scale) for i in range(NUM_REQUESTS)]
    yield {
        "one": lambda num: generate(model, batch[:1], num),
        "eight": lambda num: generate(model, batch, num),
    }


def prompt(seed: int, scale: Scale) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(10, scale.vocab_size, (scale.num_prompt,), generator=generator).tolist()
    return ids


CASES = {
    "ours": ("one", "one_experts", "eight", "eight_attention", "eight_experts"),
    "transformers": ("one", "eight"),
}
Times = dict[tuple[str, str, int], tuple[float, float]]
"""Median seconds, by the clock and of processors, by side, case and number of tokens."""


def measure(sides: Mapping[str, Child | Timed], scale: Scale) -> Times:
    samples: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for number in range(scale.num_rounds + 1):  # the first round warms up
        for case in CASES["ours"]:
            for num in (1, scale.num_tokens):
                for name, side in sides.items():
                    if case in CASES[name]:
                        elapsed = side.ask((case, num))
                        if number:
                            samples.setdefault((name, case, num), []).append(elapsed)
    return {
        key: (statistics.median(v[0] for v in values), statistics.median(v[1] for v in values))
        for key, values in samples.items()
    }


def report(times: Times, scale: Scale) -> dict[str, Any]:
    num = scale.num_tokens

    def step_s(side: str, case: str, clock: int) -> float:
        return (times[side, case, num][clock] - times[side, case, 1][clock]) / (num - 1)

    result: dict[str, Any] = {}
    for side, cases in CASES.items():
        result[side] = {
            case: {
                "tokens_per_s": (NUM_REQUESTS if case.startswith("eight") else 1)
                * num
                / times[side, case, num][0],
                "first_token_ms": times[side, case, 1][0] * 1e3,
                "step_ms": step_s(side, case, 0) * 1e3,
                "processor_s": times[side, case, num][1],
            }
            for case in cases
        }
    mine, other = result["ours"], result["transformers"]
    result["tokens_per_s_over_transformers"] = {
        case: mine[case]["tokens_per_s"] / other[case]["tokens_per_s"] for case in CASES["transformers"]
    }
    pairs = (("one_experts", "one"), ("eight_attention", "eight"), ("eight_experts", "eight"))
    result["lora_step_over_plain"] = {
        case: {
            "clock": step_s("ours", case, 0) / step_s("ours", plain, 0),
            "processor": step_s("ours", case, 1) / step_s("ours", plain, 1),
        }
        for case, plain in pairs
    }
    return result


def machine() -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    found = {name.strip(): value.strip() for name, value in fields.items()}
    flags = [flag for flag in found.get("flags", "").split() if flag.startswith(("avx2", "avx512", "amx"))]
    return {
        "cpu": found.get("model name", platform.machine()),
        "flags": flags,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = make_parser(__doc__, "a tiny model and few tokens")
    parser.add_argument("--rounds", type=int, default=FULL.num_rounds, help="rounds to take the median of")
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
            side: Timed(stack.enter_context(make(directory, scale)))
            if args.toy
            else stack.enter_context(child(serve, make, directory, scale))
            for side, make in (("ours", ours), ("transformers", theirs))
        }
        result = report(measure(sides, scale), scale)
    finish(args, "moe", machine=machine(), scale=vars(scale), **result)


if __name__ == "__main__":
    main()
