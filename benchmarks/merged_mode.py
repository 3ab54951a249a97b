"""What merged mode wins where one adapter makes nearly all of the work, beside folding without a server.

    python benchmarks/merged_mode.py          # a random model of 211 million parameters: some minutes
    python benchmarks/merged_mode.py --toy

`offline`: requests of one rank-64 adapter on all projections, over those of the base model of a checkpoint
into which PEFT has folded it: nobody decides anything, and no weight changes while requests run. `served`: 19
of 20 requests are that adapter's, the others those of three others and of the base model; the engine with
merged mode off, over the same engine once it has folded the adapter by itself, which `folding` tells of.

Ratios are of processor time, on one thread, which other work on the machine disturbs less; those of the clock
are `ratio_wall`. Rounds of all kinds of load take turns. `kept`: the served ratio over the one offline;
`gain_kept`: what is above 1 of the two. `flapping`: how often the engine took the adapter out again while the
load lasted. Ends in one JSON line.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM

from toppings.config import EngineConfig
from toppings.core import MODULES
from toppings.engine.base import open_registry
from toppings.engine.engine import Engine
from toppings.engine.merged_mode import MergedMode
from toppings.lab.engines import running_engine
from toppings.lab.script import finish, make_parser, parse
from toppings.messages import AddRequest
from toppings.sampling_params import SamplingParams
from toppings.synth import PRESETS, AdapterShape, write_adapters, write_model

MAIN_RANK, OTHER_RANKS = 64, (8, 16, 64)
EVERY = 20
"""One of so many requests is another's."""


@dataclass(frozen=True)
class Scale:
    model: str
    num_requests: int
    num_at_once: int
    num_prompt_tokens: int
    num_tokens: int
    num_rounds: int
    max_warm_up_rounds: int


FULL = Scale("small-211m", 40, 8, 64, 32, 2, 40)
TOY = Scale("tiny", 20, 4, 8, 8, 1, 3)


@dataclass(frozen=True)
class Load:
    """Requests of some adapters in turn, None the base model; `cpu_s` and `wall_s`: of each round."""

    adapter_ids: list[int | None]
    cpu_s: list[float]
    wall_s: list[float]

    @classmethod
    def of(cls, adapter_ids: list[int | None]) -> "Load":
        return cls(adapter_ids, [], [])


def play(engine: Engine, load: Load, scale: Scale) -> None:
    """`num_at_once` requests until all have been answered."""
    sampling = SamplingParams(max_tokens=scale.num_tokens, temperature=0.0, ignore_eos=True)
    waiting, turn = list(enumerate(load.adapter_ids)), len(load.cpu_s)
    cpu, wall, num_open = time.process_time(), time.perf_counter(), 0
    while waiting or engine.has_requests:
        while waiting and num_open < scale.num_at_once:
            number, adapter_id = waiting.pop(0)
            prompt = [3 + (number * 31 + turn * 7 + i * 13) % 200 for i in range(scale.num_prompt_tokens)]
            refusal = engine.add(
                AddRequest(f"{turn} {number}", prompt, sampling, adapter_id, is_cacheable=False)
            )
            assert refusal is None, refusal
            num_open += 1
        outputs = engine.step()
        assert not any(output.error for output in outputs), outputs
        num_open -= sum(output.finish_reason is not None for output in outputs)
        engine.poll()
    load.cpu_s.append(time.process_time() - cpu)
    load.wall_s.append(time.perf_counter() - wall)


def hold(merged: MergedMode, engine: Engine, adapter_id: int | None) -> None:
    """Until it is called again the adapter is folded, or none is, whatever that wins."""
    merged.policy.leave()
    merged.policy.target = adapter_id
    while merged.folded.adapter_id != adapter_id or (adapter_id is not None and not merged.folded.is_whole):
        engine.poll()


def fold_offline(model: Path, adapter: Path, path: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(path)
    for file in model.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


def config_of(model: Path, state_dir: Path, merged_mode: str) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        state_dir=str(state_dir),
        merged_mode=merged_mode,
        mode="cached",
        kv_cache_bytes=256 * 2**20,
        device_pool_bytes=256 * 2**20,
        num_threads=1,
        step_log="off",
    )


def adapters_of(root: Path, model: Path, scale: Scale) -> Iterator[tuple[str, Path]]:
    for number, rank in enumerate((MAIN_RANK, *OTHER_RANKS)):
        path = root / f"adapter-{number}"
        shape = AdapterShape(ranks=(rank,), targets=MODULES, dtype=PRESETS[scale.model].dtype)
        write_adapters(path, model, shape, count=1, seed=number)
        yield f"a{number}", path / "adapter-00000"


def warm_up(engine: Engine, merged: MergedMode, load: Load, scale: Scale) -> dict[str, Any]:
    """Until the engine has folded the adapter by itself."""
    started_at, cpu, num_rounds = time.perf_counter(), time.process_time(), 0
    while not merged.folded.is_whole and num_rounds < scale.max_warm_up_rounds:
        play(engine, load, scale)
        num_rounds += 1
    status = merged.status()
    return {
        "is_folded": merged.folded.is_whole,
        "rounds": num_rounds,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - started_at,
        "estimated_gain": status.gain,
        "share": status.share,
        "kept_bytes": status.kept_bytes,
    }


def compare(engine: Engine, folded_engine: Engine, ids: list[int], scale: Scale) -> dict[str, Any]:
    merged = engine.merged
    assert merged is not None
    main, others = ids[0], [*ids[1:], None]
    mixed: list[int | None] = [
        others[i // EVERY % len(others)] if i % EVERY == EVERY // 2 else main
        for i in range(scale.num_requests)
    ]
    folding = warm_up(engine, merged, Load.of(mixed), scale)
    flapping = merged.counters["merged_mode_unfolds"]
    engine.merged = None  # it decides nothing more
    alone: list[int | None] = [main] * scale.num_requests
    loads = {name: Load.of(each) for name, each in (("alone", alone), ("off", mixed), ("auto", mixed))}
    folded = Load.of([None] * scale.num_requests)
    for turn in range(scale.num_rounds + 1):
        for name in ("auto", "off", "alone") if turn % 2 else ("alone", "off", "auto"):
            engine.merged = merged
            hold(merged, engine, main if name == "auto" else None)
            engine.merged = None
            play(engine, loads[name], scale)
            if name == "alone":
                play(folded_engine, folded, scale)
    for load in (*loads.values(), folded):  # the first round compiles and records
        del load.cpu_s[0], load.wall_s[0]
    offline, served = ratios(loads["alone"], folded), ratios(loads["off"], loads["auto"])
    return {
        "offline": offline,
        "served": served,
        "kept": served["ratio"] / offline["ratio"],
        "gain_kept": (served["ratio"] - 1) / (offline["ratio"] - 1) if offline["ratio"] != 1 else 0.0,
        "folding": folding,
        "flapping": flapping,
        "tokens_per_cpu_s": {
            name: scale.num_requests * scale.num_tokens / min(load.cpu_s)
            for name, load in (*loads.items(), ("folded offline", folded))
        },
    }


def ratios(plain: Load, folded: Load) -> dict[str, float]:
    """Of the fastest rounds."""
    return {
        "ratio": min(plain.cpu_s) / min(folded.cpu_s),
        "ratio_wall": min(plain.wall_s) / min(folded.wall_s),
    }


def run(scale: Scale, root: Path) -> dict[str, Any]:
    model = root / "model"
    write_model(model, PRESETS[scale.model])
    paths = dict(adapters_of(root, model, scale))
    folded = fold_offline(model, paths["a0"], root / "folded")
    config = config_of(model, root / "state", "auto")
    registry = open_registry(config)
    ids = [registry.register(name, path).adapter_id for name, path in paths.items()]
    registry.close()
    with ExitStack() as stack:
        engine = stack.enter_context(running_engine(config))
        folded_config = config_of(folded, root / "folded-state", "off")
        folded_engine = stack.enter_context(running_engine(folded_config))
        return {"model": scale.model, "rank": MAIN_RANK, **compare(engine, folded_engine, ids, scale)}


def main() -> None:
    args = parse(make_parser(__doc__, "a tiny model and few tokens"))
    with tempfile.TemporaryDirectory() as directory:
        result = run(TOY if args.toy else FULL, Path(directory))
    finish(args, "merged_mode", **result)


if __name__ == "__main__":
    main()
