"""Are a whole model's tokens right on this device?

    python benchmarks/gpu/correctness.py
    python benchmarks/gpu/correctness.py --toy --device cpu

A small random checkpoint with PEFT adapters of several ranks, mixed in one batch. Asked:

* Is every greedy token the choice of transformers + PEFT in fp32, given the tokens before it? In bfloat16: is
  it as good a choice, but for rounding? `gap`: by how much the reference prefers its own, over the spread
  (standard deviation) of its logits at that place; for fp32 too, all are the reference's own.
* Do all modes give the same tokens, with room for few adapters on the device, so that most are cold?
* Is a step that is replayed from a graph bit for bit the step queued operator by operator, tokens and
  logarithms of probabilities? Asked at batch sizes for which there is a graph.

The kernels by themselves are compared with fp32 references by kernel_speed.py. Ends in one JSON line. Needs
peft. Not yet run on a GPU.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import (
    ALL_LINEAR,
    QKV,
    Bench,
    finish,
    greedy,
    make_parser,
    note,
    noted,
    open_bench,
    random_prompt,
    serve,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

from toppings.config import MODES
from toppings.engine.engine import Engine
from toppings.lab.aims import Aim, at_least, at_most
from toppings.messages import AddRequest, RequestOutput
from toppings.synth import AdapterShape, ModelShape, write_adapters, write_model

DTYPES = ("float32", "bfloat16")
SHAPE = ModelShape(hidden=512, layers=4, heads=8, kv_heads=4, intermediate=1024, vocab=1024)
TOY_SHAPE = ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocab=512)
KINDS = {"all": ((8, 64, 16), ALL_LINEAR), "qkv": ((4, 32), QKV)}
PROMPTS = (5, 33, 120, 64, 17, 250, 90, 48)
MAX_GAP = {"float32": 1e-3, "bfloat16": 0.1}
GRAPH_SIZES = (1, 2, 4, 8)
TOY_LINK_GBPS = 0.05

Tokens = dict[str, list[int]]


class RunAgain:
    """Graphs where there are none: the captured work is run again."""

    def capture(self, run: Callable[[], None]) -> "Work":
        return Work(run)


@dataclass(frozen=True)
class Work:
    replay: Callable[[], None]


@dataclass(frozen=True)
class World:
    """A checkpoint, and the bench over it; `ids`: of adapters by path, None for the base model."""

    bench: Bench
    model: Path
    ids: dict[Path | None, int | None]
    num_out: int

    def requests(self, num: int, *, num_prompt: int = 0, logprobs: int | None = None) -> list[AddRequest]:
        """Adapters in turn; `num_prompt`: a length for all prompts."""
        ids = list(self.ids.values())
        params = greedy(self.num_out, logprobs=logprobs)
        return [
            AddRequest(
                str(i), random_prompt(i, num_prompt or PROMPTS[i % len(PROMPTS)]), params, ids[i % len(ids)]
            )
            for i in range(num)
        ]


def tokens_of(engine: Engine, requests: Sequence[AddRequest]) -> Tokens:
    outputs = serve(engine, requests)
    return {name: [t for output in each for t in output.token_ids] for name, each in outputs.items()}


def check_modes(
    world: World, modes: Sequence[str], failures: dict[str, str]
) -> tuple[dict[str, float], Tokens]:
    """Per mode, the share of tokens that are those of the first mode; and these."""
    largest = max(record.num_bytes for record in world.bench.records)
    requests = world.requests(len(PROMPTS))
    found: dict[str, Tokens] = {}
    for mode in modes:
        settings: dict[str, Any] = {} if mode == "cached" else {"device_pool_bytes": 2 * largest}
        with noted(failures, mode), world.bench.engine(mode, **settings) as engine:
            first = tokens_of(engine, requests)
            again = tokens_of(engine, requests)
            found[mode] = {**first, **{f"{name} again": tokens for name, tokens in again.items()}}
            so_far = {name: share_equal(found[name], found[modes[0]]) for name in found}
            note("correctness", world.bench.options, dtype=world.bench.config.dtype, modes=so_far)
    expected = found[modes[0]]
    shares = {mode: share_equal(tokens, expected) for mode, tokens in found.items()}
    return shares, {name: tokens for name, tokens in expected.items() if "again" not in name}


def share_equal(tokens: Tokens, expected: Tokens) -> float:
    pairs = [pair for name in expected for pair in zip(tokens[name], expected[name], strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def check_reference(world: World, tokens: Tokens, device: str) -> tuple[float, float]:
    """The share of tokens that transformers + PEFT choose too, given those before, and the largest gap."""
    base = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    paths = [path for path in world.ids if path is not None]
    model = PeftModel.from_pretrained(base, paths[0], paths[0].name)
    for path in paths[1:]:
        model.load_adapter(path, path.name)
    model.to(device).eval()
    adapters = list(world.ids)
    num_equal, num, gap = 0, 0, 0.0
    for request in world.requests(len(tokens)):
        out = tokens[request.request_id]
        logits = reference_logits(model, adapters[int(request.request_id) % len(adapters)], request, out)
        chosen = torch.tensor(out, device=device)
        behind = logits.max(-1).values - logits.gather(1, chosen[:, None])[:, 0]
        gap = max(gap, float((behind / logits.std(-1)).max()))
        num_equal, num = num_equal + int((behind == 0).sum()), num + len(out)
    return num_equal / num, gap


@torch.inference_mode()
def reference_logits(model: Any, adapter: Path | None, request: AddRequest, out: list[int]) -> torch.Tensor:
    """[tokens, vocabulary]: those from which each token of `out` was to be drawn."""
    ids = torch.tensor([[*request.prompt_token_ids, *out[:-1]]], device=model.device)
    if adapter is None:
        with model.disable_adapter():
            logits = model(input_ids=ids).logits
    else:
        model.set_adapter(adapter.name)
        logits = model(input_ids=ids).logits
    found: torch.Tensor = logits[0, len(request.prompt_token_ids) - 1 :]
    return found


def check_graphs(world: World, sizes: Sequence[int], num_prompt: int) -> int:
    """How many drawn tokens differ, themselves or in their logarithms, between replayed and queued steps."""
    found: list[list[tuple[Any, ...]]] = []
    is_cuda = world.bench.options.device == "cuda"
    for switch in ("off", "decode"):
        graphs = RunAgain() if switch == "decode" and not is_cuda else None
        with world.bench.engine("cached", graphs=graphs, cuda_graphs=switch) as engine:
            own: list[tuple[Any, ...]] = []
            for size in sizes:
                requests = world.requests(size, num_prompt=num_prompt, logprobs=4)
                for name, outputs in sorted(serve(engine, requests).items()):
                    own += [(size, name, *drawn) for output in outputs for drawn in drawn_of(output)]
            found.append(own)
    queued, replayed = found
    assert len(queued) == len(replayed)
    return sum(a != b for a, b in zip(queued, replayed, strict=True))


def drawn_of(output: RequestOutput) -> list[tuple[int, float, tuple[tuple[int, float], ...]]]:
    assert output.logprobs is not None
    return [(each.token_id, each.logprob, tuple(each.top)) for each in output.logprobs]


def check(
    options: argparse.Namespace, dtype: str, root: Path, failures: dict[str, str]
) -> tuple[list[Aim], dict[str, Any]]:
    shape = TOY_SHAPE if options.toy else SHAPE
    write_model(root / "model", replace(shape, dtype=dtype))
    paths = []
    for kind, (ranks, targets) in KINDS.items():
        adapters = AdapterShape(ranks=ranks, targets=targets, dtype=dtype)
        write_adapters(root / kind, root / "model", adapters, count=len(ranks), seed=len(kind))
        paths += [path.rename(root / f"{kind}-{path.name}") for path in sorted((root / kind).iterdir())]
    settings: dict[str, Any] = {"model": str(root / "model"), "load_format": "auto", "dtype": dtype}
    settings |= {"max_num_seqs": max(GRAPH_SIZES), "max_num_batched_tokens": 1024, "max_model_len": 512}
    if options.device == "cpu":
        settings |= {"link_gbps": TOY_LINK_GBPS, "assist_workers": 1}
    with open_bench(options, kv_cache_bytes=2**28, **settings) as bench:
        bench.register_checkpoints("made", paths)
        ids: dict[Path | None, int | None] = {None: None}
        ids.update(zip(paths, bench.ids("made"), strict=True))
        world = World(bench, root / "model", ids, 4 if options.toy else 16)
        modes = options.modes.split(",") if dtype == DTYPES[0] else [options.modes.split(",")[0]]
        shares, tokens = check_modes(world, modes, failures)
        equal, gap = check_reference(world, tokens, options.device)
        # Without a GPU only fp32 has the same kernels in both kinds of steps, and for few rows.
        num_different = None
        if options.device == "cuda" or dtype == "float32":
            num_different = check_graphs(world, GRAPH_SIZES, 40 if options.device == "cuda" else 5)
    aims = [at_most(f"{dtype}: largest gap to the reference's choice", gap, MAX_GAP[dtype])]
    if dtype == "float32":
        aims.append(at_least("float32: share of tokens that are the reference's", equal, 1.0))
        others = [mode for mode in modes[1:] if mode in shares]
        aims += [at_least(f"{mode}: share of {modes[0]}'s tokens", shares[mode], 1.0) for mode in others]
    if num_different is not None:
        aims.append(at_most(f"{dtype}: tokens or their logarithms that a replay changes", num_different, 0))
    return aims, {"gap": gap, "share_equal": equal, "modes": shares, "graph_differences": num_different}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--modes", default=",".join(MODES), help="compared with the first of them")
    options = parser.parse_args()
    options.model = "random, small"
    if options.toy:
        options.modes = "cached,on_demand,pipelined"
    aims: list[Aim] = []
    results = {}
    failures: dict[str, str] = {}
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory(prefix="toppings-correct-") as root:
            found, results[dtype] = check(options, dtype, Path(root), failures)
            aims += found
    floor = "transformers + PEFT in fp32"
    return finish("correctness", options, aims, failures=failures, floor=floor, results=results)


if __name__ == "__main__":
    sys.exit(main())
