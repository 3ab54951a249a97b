"""Traces that tell what prompts share: the simulator keeps and evicts pages by the engine's own rules."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from tests.sim.builders import make_trace, simulate, stepwise
from tests.sim.test_exactness import RANKS, assert_agree, config_of, random_case
from tests.sim.virtual_engine import make_registry
from toppings.adapters.registry import AdapterRegistry
from toppings.core import Request
from toppings.engine import prefix_cache
from toppings.sampling_params import SamplingParams
from toppings.sim.assign import TraceOptions
from toppings.sim.blocks import PromptBlocks, TraceNames
from toppings.sim.readers import load_trace
from toppings.sim.trace import Trace

BLOCK_LEN = 40


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterRegistry]:
    registry = make_registry(tmp_path_factory.mktemp("adapters"), RANKS)
    yield registry
    registry.close()


def with_talks(trace: Trace, rng: Random, num_talks: int = 6) -> Trace:
    """Each request continues one of some conversations with the same adapter, or begins it anew."""
    talks: list[list[int]] = [[] for _ in range(num_talks)]
    lists, adapters, next_id = [], [], 0
    for num_tokens in trace.prompt_tokens.tolist():
        talk, num_blocks = rng.randrange(num_talks), -(-num_tokens // BLOCK_LEN)
        known = talks[talk][: rng.randint(0, num_blocks)]
        new = list(range(next_id, next_id + num_blocks - len(known)))
        next_id += len(new)
        talks[talk] = [*known, *new]
        lists.append(talks[talk])
        adapters.append(talk % 3)
    return replace(trace, adapters=np.array(adapters, np.int32), blocks=PromptBlocks.of(lists, BLOCK_LEN))


def test_blocks_are_read_with_their_requests_in_order(tmp_path: Path) -> None:
    rows = [(3000, 1100, [7, 8, 9]), (1000, 600, [7, 5]), (2000, 0, [4]), (9000, 30, [])]
    path = tmp_path / "trace.jsonl"
    names = ("timestamp", "input_length", "hash_ids")
    path.write_text("".join(json.dumps({**dict(zip(names, r)), "output_length": 3}) + "\n" for r in rows))
    trace = load_trace(path)
    assert trace.blocks is not None
    assert [trace.blocks[i] for i in range(len(trace))] == [[7, 5], [7, 8, 9], []]
    later = load_trace(path, TraceOptions(start_s=1.0, duration_s=2.0))
    assert later.blocks is not None
    assert [later.blocks[i] for i in range(len(later))] == [[7, 8, 9]]


def test_pages_are_named_by_the_block_of_their_last_token() -> None:
    names = TraceNames(PromptBlocks.of([[1, 2, 3], [1, 2, 9], [1, 2], [1, 2, 3]], 40), 16)
    hashes = []
    for row, adapter_id in enumerate((5, 5, 5, 6)):
        request = Request(str(row), list(range(100)), SamplingParams(), adapter_id)
        names.extend(request, 100)
        names.extend(request, 150)
        assert len(request.block_hashes) == len(set(request.block_hashes)) == 9
        hashes.append(request.block_hashes)
    shared = [sum(a == b for a, b in zip(hashes[0], other)) for other in hashes[1:]]
    assert shared == [5, 5, 0]  # 80 tokens; the prompts' 100 fill six pages


def test_what_prompts_share_is_computed_once() -> None:
    trace = make_trace([0.0, 5.0, 10.0], prompt=[100, 140, 100])
    trace = replace(trace, blocks=PromptBlocks.of([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3]], BLOCK_LEN))
    totals = simulate(config_of(mode="cached"), trace).instances[0]
    assert (totals.num_queried_tokens, totals.num_cached_tokens) == (340, 80 + 96)
    plain = simulate(config_of(mode="cached", enable_prefix_caching="off"), trace)
    assert plain.instances[0].num_queried_tokens == 0
    expected = simulate(config_of(mode="cached"), replace(trace, blocks=None))
    assert plain.ended_at.tolist() == expected.ended_at.tolist()


@pytest.mark.parametrize("seed", range(12))
def test_the_engine_shares_the_same_pages(
    registry: AdapterRegistry, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for leads: an engine counts a request as arrived when it hears of it."""
    monkeypatch.setattr(prefix_cache, "MAX_LEAD_S", 0.0)
    rng = Random(seed)
    config, trace = random_case(rng)
    trace = with_talks(trace, rng)
    totals = assert_agree(registry, config, trace)
    assert totals.num_cached_tokens > 0 or len(trace) < 20
    whole = simulate(config, trace)
    steps = simulate(stepwise(config), trace)
    assert steps.ended_at.tolist() == whole.ended_at.tolist()
    assert [t.num_cached_tokens for t in steps.instances] == [t.num_cached_tokens for t in whole.instances]
