"""What the prefix cache spares, how near its hits are to the best, and what it costs where nothing is shared.

    python benchmarks/prefix_cache.py          # 211 M parameters in bf16: some minutes
    python benchmarks/prefix_cache.py --toy

`ttft`: of a request whose first 1,000 tokens another one has computed, over that one's; the median of pairs.
`chain`: time to the first token of an activated LoRA that judges what the base model has just read and said,
over that of an ordinary LoRA; medians. `chat`: prompt tokens computed in 20 turns of a chat, over those that
were new. `trace`: multi-turn conversations with system prompts in common, on one simulated server with the
engine's own scheduler; its hits over those of an LRU cache of the same size that sees one request after
another, computed offline. `kept`: pages alone, one request after another, by recency and by recency and cost:
hits, and the cost that they spare, over LRU's. `overhead`: processor time that naming, keeping and evicting
pages adds to the scheduler's when no prompts are alike, over all that the engine takes for the same tokens.
Ends in one JSON line.
"""

import json
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from toppings.cluster.perf_model import load_perf_model
from toppings.config import EngineConfig
from toppings.core import Admission, BlockHash, Request
from toppings.engine.base import open_registry
from toppings.engine.block_hashes import BlockHasher
from toppings.engine.engine import Engine
from toppings.engine.pages import PageAllocator, pages_for
from toppings.engine.scheduler import Scheduler
from toppings.engine.scheduler_limits import SchedulerLimits
from toppings.lab.engines import running_engine
from toppings.lab.script import finish, make_parser, parse
from toppings.messages import AddRequest
from toppings.sampling_params import SamplingParams
from toppings.sim.blocks import PromptBlocks, TraceNames
from toppings.sim.settings import SimConfig
from toppings.sim.simulator import Simulator
from toppings.sim.trace import Trace
from toppings.synth import PRESETS, AdapterShape, write_adapters, write_model

PAGE_SIZE = 16
BLOCK_LEN = 512
DOUBLE_COST_LEN = 8192.0
MAX_CONTEXT = 30_000
INVOCATION = [251, 252, 253]
SESSION_GAP_S = 3.0
LIMITS = SchedulerLimits(
    max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=1024, max_adapter_wait_s=1.0
)


@dataclass(frozen=True)
class Scale:
    preset: str
    num_shared: int
    num_chain: int
    num_pairs: int
    num_turns: int
    num_sessions: int
    cache_tokens: int
    num_unshared: int
    num_rounds: int


FULL = Scale("small-211m", 1000, 2000, 5, 20, 800, 262_144, 48, 15)
TOY = Scale("tiny", 100, 200, 2, 4, 40, 32_768, 8, 2)


# --- the engine ---


def prompt_of(rng: np.random.Generator, num_tokens: int) -> list[int]:
    tokens: list[int] = rng.integers(3, 250, num_tokens).tolist()
    return tokens


def answer(
    engine: Engine, name: str, prompt: list[int], num_tokens: int, adapter_id: int | None = None
) -> tuple[float, list[int]]:
    """Seconds to the first token, and all of them."""
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    started_at = time.perf_counter()
    assert engine.add(AddRequest(name, prompt, sampling, adapter_id)) is None
    first_s, tokens = 0.0, list[int]()
    while engine.has_requests:
        tokens += [token for output in engine.step() for token in output.token_ids]
        first_s = first_s or time.perf_counter() - started_at
    return first_s, tokens


def ttft(engine: Engine, scale: Scale, rng: np.random.Generator) -> dict[str, float]:
    pairs = []
    for pair in range(scale.num_pairs):
        shared = prompt_of(rng, scale.num_shared)
        pairs.append(
            [answer(engine, f"{pair} {i}", [*shared, *prompt_of(rng, 16)], 2)[0] * 1e3 for i in range(2)]
        )
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(second / first for first, second in pairs)
    return {"first_ms": first, "second_ms": second, "second_over_first": ratio}


def register(directory: Path, config: EngineConfig) -> dict[str, int]:
    """The ids of one adapter of rank 16, and of the same as an activated one."""
    write_adapters(directory / "adapters", directory / "model", AdapterShape(ranks=(16,)), count=2)
    registry, ids = open_registry(config), {}
    for kind, path in zip(("ordinary", "activated"), sorted((directory / "adapters").iterdir()), strict=True):
        if kind == "activated":
            file = path / "adapter_config.json"
            activated = {"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"}
            file.write_text(json.dumps({**json.loads(file.read_text()), **activated}))
        ids[kind] = registry.register(kind, path).adapter_id
    registry.close()
    return ids


def chain(engine: Engine, scale: Scale, ids: dict[str, int], rng: np.random.Generator) -> dict[str, float]:
    times: dict[str, list[float]] = {kind: [] for kind in ids}
    for turn in range(scale.num_pairs):
        context = prompt_of(rng, scale.num_chain)
        judged = [*context, *answer(engine, f"context {turn}", context, 8)[1], *INVOCATION]
        for kind, adapter_id in ids.items():
            if not turn:
                answer(engine, f"load {kind}", prompt_of(rng, 20), 2, adapter_id)
            times[kind].append(answer(engine, f"{kind} {turn}", judged, 2, adapter_id)[0] * 1e3)
    ordinary, activated = (statistics.median(times[kind]) for kind in ("ordinary", "activated"))
    return {"ordinary_ms": ordinary, "activated_ms": activated, "ratio": activated / ordinary}


def chat(engine: Engine, scale: Scale, rng: np.random.Generator) -> dict[str, float]:
    before = engine.stats(0).counters
    history, num_new = prompt_of(rng, 200), 200
    for turn in range(scale.num_turns):
        said = prompt_of(rng, 60)
        history, num_new = [*history, *said], num_new + len(said)
        history += answer(engine, f"turn {turn}", history, 24)[1]
    grown = {name: value - before[name] for name, value in engine.stats(0).counters.items()}
    computed = grown["prefix_cache_queries"] - grown["prefix_cache_hits"]
    return {"new_tokens": num_new, "computed_tokens": computed, "computed_over_new": computed / num_new}


# --- traces ---


@dataclass(frozen=True)
class Turn:
    """`ids`: of the prompt's blocks, as Mooncake's: of 512 tokens, the last one shorter."""

    at: float
    num_prompt: int
    num_response: int
    ids: list[int]


def session(
    number: int, begin_at: float, system: int, num_shared: int, rng: np.random.Generator
) -> list[Turn]:
    """Its turns repeat all that was said before, and come some tens of seconds apart. It begins with
    `num_shared` tokens of a system prompt."""
    turns: list[Turn] = []
    at, num_tokens = begin_at, num_shared
    for turn in range(int(rng.geometric(0.2))):
        num_tokens += int(rng.lognormal(5.5, 0.9)) + 1
        response = min(800, int(rng.lognormal(5.0, 0.7)) + 1)
        if num_tokens + response > MAX_CONTEXT:
            break
        num_whole, num_common = num_tokens // BLOCK_LEN, num_shared // BLOCK_LEN
        common = [10_000_000_000 + system * 1000 + block for block in range(min(num_whole, num_common))]
        own = [number * 1000 + block for block in range(num_common, num_whole)]
        turns.append(Turn(at, num_tokens, response, [*common, *own, -(number * 1000 + turn) - 1]))
        num_tokens += response
        at += 5.0 + rng.exponential(30.0)
    return turns


def talks(scale: Scale) -> Trace:
    """Sessions that begin at random, each with one of 20 system prompts of Zipf's popularity."""
    rng = np.random.default_rng(0)
    lengths, weights = rng.integers(500, 3000, 20).tolist(), 1 / np.arange(1, 21)
    begins = np.cumsum(rng.exponential(SESSION_GAP_S, scale.num_sessions)).tolist()
    systems = rng.choice(20, scale.num_sessions, p=weights / weights.sum()).tolist()
    sessions = enumerate(zip(begins, systems, strict=True))
    turns = [turn for i, (at, system) in sessions for turn in session(i, at, system, lengths[system], rng)]
    turns.sort(key=lambda turn: turn.at)
    return Trace(
        np.array([turn.at for turn in turns]),
        np.zeros(len(turns), np.int32),
        np.array([turn.num_prompt for turn in turns], np.int32),
        np.array([turn.num_response for turn in turns], np.int32),
        np.array([8], np.int32),
        turns[-1].at + 1,
        "talks",
        blocks=PromptBlocks.of([turn.ids for turn in turns], BLOCK_LEN),
    )


def requests_of(trace: Trace) -> Iterator[tuple[Request, int]]:
    """With all its pages named, and how many of these are the prompt's that may be found."""
    assert trace.blocks is not None
    names = TraceNames(trace.blocks, PAGE_SIZE)
    rows = zip(trace.prompt_tokens.tolist(), trace.response_tokens.tolist(), strict=True)
    for index, (num_prompt, num_response) in enumerate(rows):
        request = Request(str(index), range(num_prompt), SamplingParams(), 0)  # type: ignore[arg-type]
        names.extend(request, num_prompt + num_response - 1)
        yield request, (num_prompt - 1) // PAGE_SIZE


def cost_of(first: int, last: int) -> float:
    """Of computing these pages of a sequence, in pages without context."""
    return sum(1 + page * PAGE_SIZE / DOUBLE_COST_LEN for page in range(first, last))


def lru_hits(trace: Trace, num_pages: int) -> tuple[int, float]:
    """Pages found, one request after another, and what they would have cost."""
    cache: OrderedDict[BlockHash, None] = OrderedDict()
    num_hits, spared = 0, 0.0
    for request, num_useful in requests_of(trace):
        names = request.block_hashes
        found = next((i for i, name in enumerate(names[:num_useful]) if name not in cache), num_useful)
        num_hits, spared = num_hits + found, spared + cost_of(0, found)
        for name in reversed(names):
            cache[name] = None
            cache.move_to_end(name)
        while len(cache) > num_pages:
            cache.popitem(last=False)
    return num_hits, spared


def kept_hits(trace: Trace, num_pages: int, double_cost_len: float) -> tuple[int, float]:
    """As `lru_hits`, of the engine's pages."""
    pages = PageAllocator(num_pages, PAGE_SIZE, double_cost_len=double_cost_len)
    num_hits, spared = 0, 0.0
    for request, num_useful in requests_of(trace):
        names, table = request.block_hashes, request.page_table
        found = min(pages.num_found(names), num_useful)
        num_hits, spared = num_hits + found, spared + cost_of(0, found)
        pages.share(table, names[:found])
        assert pages.grow(table, len(names) * PAGE_SIZE)
        for index in range(found, len(names)):
            pages.keep(table, index, names[index])
        pages.free(table)
    pages.check_integrity([])
    return num_hits, spared


def traces(scale: Scale) -> dict[str, Any]:
    trace, num_pages = talks(scale), scale.cache_tokens // PAGE_SIZE
    lru, lru_spared = lru_hits(trace, num_pages)
    unbounded, _ = lru_hits(trace, 1 << 40)
    config = SimConfig(
        perf_model=load_perf_model("published:mbgmv"),
        mode="cached",
        kv_cache_tokens=scale.cache_tokens,
        page_size=PAGE_SIZE,
    )
    [server] = Simulator(config, trace).run().instances
    by_cost = {"recency": float("inf"), "recency and cost": DOUBLE_COST_LEN}
    kept = {name: kept_hits(trace, num_pages, length) for name, length in by_cost.items()}
    return {
        "trace": {
            "requests": len(trace),
            "prompt_tokens": int(trace.prompt_tokens.sum()),
            "cache_tokens": scale.cache_tokens,
            "hit_share": server.num_cached_tokens / server.num_queried_tokens,
            "hit_share_unbounded": unbounded * PAGE_SIZE / int(trace.prompt_tokens.sum()),
            "over_lru": server.num_cached_tokens / (lru * PAGE_SIZE),
            "preemptions": server.num_preemptions,
        },
        "kept": {
            name: {"hits_over_lru": hits / lru, "spared_over_lru": spared / lru_spared}
            for name, (hits, spared) in kept.items()
        },
    }


# --- what it costs ---


class NoAdapters:
    """Every request is the base model's."""

    def prefetch(self, adapter_id: int) -> None: ...
    def release(self, adapter_id: int) -> None: ...

    def holds(self, adapter_id: int) -> bool:
        return False

    def try_acquire(self, adapter_id: int, now: float, *, num_tokens: int = 1) -> Admission:
        return Admission.READY

    def may_acquire(self, adapter_id: int) -> bool:
        return True

    def load_tokens(self, adapter_id: int) -> float:
        return 0.0

    def victims_for(self, adapter_id: int) -> list[int]:
        return []


def scheduling_s(prompts: Sequence[list[int]], num_tokens: int, num_pages: int, *, is_on: bool) -> float:
    """Processor time of all that the scheduler does for these requests."""
    names = BlockHasher(PAGE_SIZE) if is_on else None
    scheduler = Scheduler(LIMITS, PageAllocator(num_pages, PAGE_SIZE), NoAdapters(), names)
    sampling = SamplingParams(max_tokens=num_tokens)
    started_at = time.process_time()
    for index, prompt in enumerate(prompts):
        scheduler.add(Request(str(index), prompt, sampling, arrived_at=float(index)))
    while scheduler.running or scheduler.waiting:
        batch = scheduler.schedule(0.0)
        drawing = [item.request for item in batch.items if item.needs_sample]
        scheduler.commit(batch)
        scheduler.cache.keep(batch.items)
        for request in drawing:
            request.output_token_ids.append(5)
            if len(request.output_token_ids) == num_tokens:
                scheduler.finish(request)
    return time.process_time() - started_at


def overhead(engine: Engine, scale: Scale, rng: np.random.Generator) -> dict[str, float]:
    prompts, num_tokens = [prompt_of(rng, 256) for _ in range(scale.num_unshared)], 64
    num_pages = 20 * pages_for(256 + num_tokens, PAGE_SIZE)  # so that pages are evicted all the time
    added: list[float] = []
    for _ in range(scale.num_rounds):
        off, on = (scheduling_s(prompts, num_tokens, num_pages, is_on=is_on) for is_on in (False, True))
        added.append(on - off)
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    started_at = time.process_time()
    for index, prompt in enumerate(prompts):
        engine.add(AddRequest(f"unshared {index}", prompt, sampling, is_cacheable=False))
    while engine.has_requests:
        engine.step()
    engine_s, added_s = time.process_time() - started_at, statistics.median(added)
    return {
        "added_us_per_request": added_s / len(prompts) * 1e6,
        "engine_us_per_request": engine_s / len(prompts) * 1e6,
        "share": added_s / engine_s,
    }


def run(scale: Scale, directory: Path) -> dict[str, Any]:
    write_model(directory / "model", PRESETS[scale.preset])
    config = EngineConfig(
        model=str(directory / "model"), state_dir=str(directory / "state"), kv_cache_bytes=512 * 2**20
    )
    ids, rng = register(directory, config), np.random.default_rng(1)
    result: dict[str, Any] = {}
    with running_engine(config) as engine:
        answer(engine, "warm-up", prompt_of(rng, 300), 3)
        result["ttft"] = ttft(engine, scale, rng)
        result["chain"] = chain(engine, scale, ids, rng)
        result["chat"] = chat(engine, scale, rng)
        result["overhead"] = overhead(engine, replace(scale, num_unshared=min(16, scale.num_unshared)), rng)
    return {**result, **traces(scale)}


def main() -> None:
    args = parse(make_parser(__doc__, "a tiny model and a short trace"))
    with tempfile.TemporaryDirectory() as directory:
        result = run(TOY if args.toy else FULL, Path(directory))
    finish(args, "prefix_cache", **result)


if __name__ == "__main__":
    main()
