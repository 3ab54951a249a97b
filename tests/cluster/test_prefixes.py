"""A router knows which prompts' beginnings a server has computed, and counts only what is new there."""

import json
import math
from contextlib import ExitStack
from random import Random
from typing import Any

import numpy as np
import pytest

from tests.cluster.conftest import Start
from tests.cluster.fakes import FakeVllm, serving
from toppings.cluster.dispatcher import Dispatcher
from toppings.cluster.instances import PREFILL
from toppings.cluster.perf_model import TOKENS, load_perf_model
from toppings.cluster.policies import PolicySettings, make_policy
from toppings.cluster.prefixes import PrefixIndex
from toppings.cluster.router.calls import Call, parse_call
from toppings.cluster.router.prompt_blocks import BLOCK_BYTES, MAX_BLOCKS
from toppings.cluster.snapshot import Choice, InstanceSnapshot, RequestSnapshot

MODEL = load_perf_model("published:mbgmv")
AWARE = ("rank_aware", "rank_aware_residency")


def depth(blocks: list[int], held: dict[int, None]) -> int:
    return next((i for i, name in enumerate(blocks) if name not in held), len(blocks))


def test_depths_are_those_of_servers_that_each_keep_what_they_got_last() -> None:
    """Against a plain list of what each server holds; servers come and go."""
    rng = Random(1)
    index, servers, num_next, held = (
        PrefixIndex(),
        [f"s{i}" for i in range(9)],
        9,
        dict[str, dict[int, None]](),
    )
    index.set_instances(servers)
    outcomes = set()
    for _ in range(3000):
        length, start = rng.randint(1, 12), 100 * rng.randint(0, 5)
        blocks = [start + i for i in range(length)]
        expected = [depth(blocks, held.get(each, {})) for each in servers]
        found = index.depths(blocks)
        assert (found is None) == (not any(expected))
        assert found is None or found.tolist() == expected
        outcomes.add(found is None)
        server = rng.choice(servers)
        index.note(server, blocks, 20)
        mine = held.setdefault(server, {})
        for name in reversed(blocks):
            mine.pop(name, None)
            mine[name] = None
        while len(mine) > 20:
            del mine[next(iter(mine))]
        if rng.random() < 0.02:
            gone = servers.pop(rng.randrange(len(servers)))
            held.pop(gone, None)
            servers.append(f"s{num_next}")
            num_next += 1
            index.set_instances(servers)
        elif rng.random() < 0.02:
            held.pop(server)
            index.forget(server)
    index.check_integrity()
    assert outcomes == {True, False}


def test_a_server_is_remembered_for_no_more_than_its_cache_holds() -> None:
    index = PrefixIndex()
    index.set_instances(["a"])
    for start in range(0, 5000, 10):
        index.note("a", range(start, start + 10), 64.0)
    assert index.num_blocks("a") == 64
    assert index.depths([1]) is None


# --- deciding ---


def dispatcher(policy: str, num: int = 3, **settings: Any) -> Dispatcher:
    snapshots = [InstanceSnapshot(instance_id=f"s{i}", perf_model=MODEL) for i in range(num)]
    return Dispatcher(make_policy(policy, PolicySettings(**settings)), snapshots)


def turn(name: str, num_blocks: int, adapter: str = "a", talk: str = "x") -> RequestSnapshot:
    blocks = [(adapter, talk, i) for i in range(num_blocks)]
    return RequestSnapshot(name, adapter, 8, 512 * num_blocks + 100, 64.0, 0, blocks, 512.0)


def placed(brain: Dispatcher, request: RequestSnapshot) -> Choice:
    choice = brain.place(request, 0.0)
    assert choice is not None
    return choice


@pytest.mark.parametrize("policy", AWARE)
def test_a_conversation_goes_on_where_it_began_and_counts_there_with_what_is_new(policy: str) -> None:
    brain = dispatcher(policy)
    first = placed(brain, turn("1", 4))
    brain.ended("1", 10)
    for number in range(3):  # others' are spread meanwhile
        placed(brain, turn(f"other {number}", 2, talk=str(number)))
    for number in range(3):
        brain.ended(f"other {number}", 10)
    second = turn("2", 6)
    assert placed(brain, second).instance_id == first.instance_id
    assert second.cached_tokens == 4 * 512
    row = first.row
    assert brain.fleet.batches[PREFILL, TOKENS, row] == 2 * 512 + 100
    brain.fleet.check_integrity()
    brain.started("2")
    assert brain.fleet.batches[PREFILL, TOKENS, row] == 0
    brain.ended("2", 10)
    brain.fleet.check_integrity()


@pytest.mark.parametrize("policy", AWARE)
def test_a_server_that_is_too_busy_gets_no_more_though_it_knows_the_prompt(policy: str) -> None:
    brain = dispatcher(policy, slo_tpt_ms=40.0)
    home = placed(brain, turn("1", 2)).instance_id
    brain.ended("1", 10)
    for number in range(60):
        brain.sent(RequestSnapshot(f"load {number}", f"b{number}", 64, 64, 64.0), home)
    assert placed(brain, turn("2", 2)).instance_id != home


def test_what_another_adapter_computed_or_a_server_lost_is_not_found() -> None:
    brain = dispatcher("rank_aware_residency")
    home = placed(brain, turn("1", 4)).instance_id
    other = turn("2", 4, adapter="b")
    placed(brain, other)
    assert other.cached_tokens == 0
    brain.forget_prefixes(home)
    again = turn("3", 4)
    placed(brain, again)
    assert again.cached_tokens == 0
    brain.remove_instance(home)
    brain.add_instance(InstanceSnapshot(instance_id="new", perf_model=MODEL))
    placed(brain, turn("4", 5))
    brain.fleet.check_integrity()


def test_a_request_that_is_moved_counts_whole_where_it_goes() -> None:
    brain = dispatcher("rank_aware", num=2)
    home = placed(brain, turn("1", 4)).instance_id
    second = turn("2", 4)
    assert placed(brain, second).instance_id == home
    assert second.cached_tokens > 0
    away = "s1" if home == "s0" else "s0"
    brain.sent(second, away)
    assert second.cached_tokens == 0
    brain.fleet.check_integrity()


def test_without_blocks_nothing_is_remembered_and_decisions_are_as_ever() -> None:
    brain = dispatcher("rank_aware")
    for number in range(20):
        placed(brain, RequestSnapshot(str(number), "a", 8, 100, 64.0))
    assert not np.any(brain.fleet.found_tokens)
    assert all(brain._prefixes.num_blocks(each) == 0 for each in brain.fleet.ids)


# --- prompts as they stand in bodies ---


def call(body: dict[str, Any], path: str = "/v1/chat/completions", *, names_blocks: bool = True) -> Call:
    return parse_call(path, json.dumps(body).encode(), 4.0, names_blocks=names_blocks)


def talk(*contents: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content} for content in contents]
    return {"model": "small", "messages": messages, **fields}


def num_shared(one: Call, other: Call) -> int:
    pairs = zip(one.blocks, other.blocks, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.blocks), len(other.blocks)))


def test_turns_of_a_conversation_share_the_blocks_of_what_was_said_before() -> None:
    said = "".join(f"word {i} " for i in range(500))
    first, second = call(talk(said)), call(talk(said, "yes?", said))
    assert len(first.blocks) == len(json.dumps(talk(said)["messages"])) // BLOCK_BYTES
    assert num_shared(first, second) == len(first.blocks)
    assert len(second.blocks) > len(first.blocks)
    assert first.block_tokens == pytest.approx(256, rel=0.01)
    assert num_shared(first, call(talk("other " + said))) == 0


@pytest.mark.parametrize(
    "fields",
    [{"model": "large"}, {"cache_salt": "mine"}, {"tools": [{"type": "function"}]}, {"system": "Be."}],
)
def test_what_else_decides_what_a_prompt_becomes_keeps_its_blocks_apart(fields: dict[str, Any]) -> None:
    said = "word " * 1000
    assert num_shared(call(talk(said)), call(talk(said, **fields))) == 0


def test_token_ids_are_named_too_and_what_is_short_long_or_not_asked_for_is_bounded() -> None:
    ids = list(range(3000))
    body = {"model": "small", "prompt": ids}
    one, more = call(body, "/v1/completions"), call({**body, "prompt": [*ids, 7, 8]}, "/v1/completions")
    assert num_shared(one, more) == len(one.blocks) > 3
    assert one.block_tokens * len(one.blocks) <= 3001
    assert call(talk("hello")).blocks == ()
    assert len(call(talk("x" * 10_000_000)).blocks) == MAX_BLOCKS
    assert call(talk("x" * 5000), names_blocks=False).blocks == ()
    generate = call({"inputs": "x" * 5000}, "/generate")
    assert num_shared(generate, call({"inputs": "x" * 5000}, "/generate_stream")) == len(generate.blocks) == 4


async def test_the_router_sends_a_conversation_on_to_the_server_that_has_it(start_router: Start) -> None:
    servers = [FakeVllm() for _ in range(3)]
    said = "".join(f"word {i} " for i in range(1500))
    path = "/v1/chat/completions"
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(server)) for server in servers]
        async with start_router(*urls, policy="rank_aware") as client:

            async def ask(*contents: str) -> str:
                async with client.complete(path=path, messages=talk(*contents)["messages"]) as response:
                    assert response.status == 200
                    return str(response.headers["X-Toppings-Instance"])

            avoid = client.router.state.dispatcher.avoid
            for number in range(3):  # each begins on another server
                for other in {0, 1, 2} - {number}:
                    avoid(f"s{other}", math.inf)
                assert await ask(f"{number} {said}") == f"s{number}"
                for other in range(3):
                    avoid(f"s{other}", 0.0)
            for number in (2, 0, 1):
                assert await ask(f"{number} {said}", "and then?") == f"s{number}"
            assert await ask("hello") == "s0"
