"""Conversations: what their prompts share, how they are written and read, and what a router wins by it."""

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.sim.builders import PUBLISHED, simulate
from toppings.sim.assign import TraceOptions
from toppings.sim.readers import load_trace
from toppings.sim.records import SimResult
from toppings.sim.settings import SimConfig
from toppings.sim.synth.talks import BLOCK_LEN, MOST_TOKENS
from toppings.sim.synth.workload import Workload, preset
from toppings.sim.trace import Trace, write_trace

TALKS = replace(preset("conversations"), rate=4.0, duration_s=120.0, num_adapters=32)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return TALKS.make_trace(0)


def conversations(trace: Trace) -> list[list[int]]:
    """Requests that begin with the same block, in order."""
    assert trace.blocks is not None
    found = defaultdict[int, list[int]](list)
    for row in range(len(trace)):
        ids = trace.blocks[row]
        if trace.prompt_tokens[row] >= BLOCK_LEN:
            found[ids[0]].append(row)
    return list(found.values())


def test_each_turn_begins_with_all_that_was_said_and_is_for_the_same_adapter(trace: Trace) -> None:
    assert trace.blocks is not None
    assert len(trace) / trace.duration_s == pytest.approx(TALKS.rate, rel=0.25)
    turns = conversations(trace)
    assert max(map(len, turns)) > 5
    for rows in turns:
        assert len(set(trace.adapters[rows].tolist())) == 1
        assert (np.diff(trace.arrivals_s[rows]) > 0).all()
        for before, after in pairwise(rows):
            said = trace.prompt_tokens[before] + trace.response_tokens[before]
            assert trace.prompt_tokens[after] > said
            num_full = trace.prompt_tokens[before] // BLOCK_LEN
            ids = trace.blocks[before]
            assert trace.blocks[after][:num_full] == ids[:num_full]
            assert len(ids) == -(-trace.prompt_tokens[before] // BLOCK_LEN)
            assert ids[num_full:] != trace.blocks[after][num_full : num_full + 1]
    assert trace.prompt_tokens.max() <= MOST_TOKENS


def test_a_load_of_conversations_is_as_large_at_its_beginning_as_at_its_end() -> None:
    trace = replace(TALKS, rate=30.0, duration_s=200.0).make_trace(1)
    halves = [trace.between(at, at + 100.0) for at in (0.0, 100.0)]
    assert len(halves[0]) == pytest.approx(len(halves[1]), rel=0.15)
    assert halves[0].prompt_tokens.mean() == pytest.approx(halves[1].prompt_tokens.mean(), rel=0.15)


def test_a_written_file_has_the_same_blocks_and_its_conversations_one_adapter_each(
    trace: Trace, tmp_path: Path
) -> None:
    path = tmp_path / "talks.jsonl"
    write_trace(trace, path)
    read = load_trace(path, TraceOptions(num_adapters=32))
    assert read.blocks is not None
    assert trace.blocks is not None
    assert [read.blocks[i] for i in range(len(read))] == [trace.blocks[i] for i in range(len(trace))]
    long = [rows for rows in conversations(read) if read.prompt_tokens[rows[0]] >= 2 * BLOCK_LEN]
    assert all(len(set(read.adapters[rows].tolist())) == 1 for rows in long)
    assert len(set(read.adapters.tolist())) > 10
    with pytest.raises(ValueError, match=r"would lose what prompts have in common; name the file \*\.jsonl"):
        write_trace(trace, tmp_path / "talks.csv")


@pytest.mark.parametrize(("name", "value"), [("turns", 0.5), ("turns", float("inf")), ("pause_s", 0.0)])
def test_numbers_that_no_conversation_has_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Workload(**{name: value})  # type: ignore[arg-type]


def routed(trace: Trace, num: int, policy: str = "rank_aware", prefix_routing: str = "on") -> SimResult:
    config = SimConfig(
        perf_model=PUBLISHED,
        policy=policy,
        num_instances=num,
        mode="cached",
        max_model_len=20_000,
        kv_cache_tokens=131_072 * 8 // num,
        max_num_batched_tokens=65_536 // num,
        prefix_routing=prefix_routing,
    )
    return simulate(config, trace)


def num_cached(result: SimResult) -> int:
    return sum(each.num_cached_tokens for each in result.instances)


def ttft_mean(result: SimResult) -> float:
    return float((result.first_token_at - result.arrived_at)[result.has_ended].mean())


@pytest.mark.parametrize("policy", ["rank_aware", "rank_aware_residency"])
def test_a_router_that_knows_prefixes_finds_nearly_what_one_server_would(
    trace: Trace, policy: str, tmp_path: Path
) -> None:
    """Within 5 % of one server that has all the cache, first tokens 1.5 times as soon as without, load as
    even."""
    path = tmp_path / "talks.jsonl"
    write_trace(trace, path)
    read = load_trace(path, TraceOptions(num_adapters=32))
    knows, guesses = (routed(read, 8, policy, prefix_routing) for prefix_routing in ("on", "off"))
    ideal = num_cached(routed(replace(read, arrivals_s=read.arrivals_s * 9, duration_s=1080.0), 1))
    assert num_cached(knows) > 0.95 * ideal
    assert num_cached(guesses) < 0.4 * ideal
    assert ttft_mean(guesses) > 1.5 * ttft_mean(knows)
    for result in (knows, guesses):
        busy = np.array([each.busy_s for each in result.instances])
        assert busy.std() / busy.mean() < 0.1
