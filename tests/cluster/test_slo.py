"""Objectives, and what gives way: interactive requests are refused early, batch ones fill what they leave."""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import Client, Start
from tests.cluster.fakes import FakeVllm, serving
from tests.waiting import until
from toppings.cluster.batch_class import BATCH_SHARE, MAX_TRIED, Held
from toppings.cluster.dispatcher import Dispatcher
from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.policies import PolicySettings, make_policy
from toppings.cluster.snapshot import InstanceSnapshot, RequestSnapshot
from toppings.slo import BATCH, INTERACTIVE, SLO_CLASS_HEADER, is_batch
from toppings.tenants.keys import add_key

MODEL = load_perf_model("published:mbgmv")
BATCH_HEADERS = {SLO_CLASS_HEADER: BATCH}


def request(name: str, *, prompt: int = 100, has_time: bool = False) -> RequestSnapshot:
    return RequestSnapshot(name, None, 0, prompt, 100.0, is_batch=has_time)


def dispatcher(
    *, num: int = 1, max_num_seqs: float = 1e9, slo_tpt_ms: float = math.inf, slo_ttft_ms: float = math.inf
) -> Dispatcher:
    servers = [
        InstanceSnapshot(instance_id=str(i), perf_model=MODEL, max_num_seqs=max_num_seqs) for i in range(num)
    ]
    return Dispatcher(make_policy("rank_aware", PolicySettings(slo_tpt_ms, slo_ttft_ms=slo_ttft_ms)), servers)


def predicted(num_running: int, prompt: int = 100, *, max_num_seqs: float = 1e9) -> tuple[float, float]:
    """TPT and TTFT, ms, of one more beside so many."""
    brain = dispatcher(max_num_seqs=max_num_seqs)
    for i in range(num_running):
        brain.place(request(f"r{i}"), 0.0)
        brain.started(f"r{i}")
    choice = brain.place(request("new", prompt=prompt), 0.0)
    assert choice is not None
    assert choice.predicted_tpt_ms is not None
    assert choice.predicted_ttft_ms is not None
    return choice.predicted_tpt_ms, choice.predicted_ttft_ms


def test_the_first_token_comes_later_behind_others_and_on_a_full_server() -> None:
    brain = dispatcher()
    told = [brain.place(request(name, prompt=1000), 0.0) for name in "ab"]
    first_ms, second_ms = (choice.predicted_ttft_ms or 0.0 for choice in told if choice is not None)
    assert second_ms > 1.5 * first_ms  # it waits for the first one's prompt
    tpt_ms, _ = predicted(4)
    _, full_ms = predicted(4, max_num_seqs=4)
    assert full_ms - predicted(4)[1] == pytest.approx(100 * tpt_ms / 4)  # a quarter of a response's time


def test_an_objective_for_the_first_token_is_kept_where_one_can() -> None:
    """The server that costs others least has a long prompt before it."""
    brain = dispatcher(num=2, slo_ttft_ms=200.0)
    for i in range(6):
        brain.sent(request(f"r{i}"), "1")
        brain.started(f"r{i}")
    brain.sent(request("long", prompt=4000), "0")
    choice = brain.place(request("new"), 0.0)
    assert choice is not None
    assert (choice.instance_id, choice.breaks_slo) == ("1", False)
    patient = dispatcher(num=2)
    for i in range(6):
        patient.sent(request(f"r{i}"), "1")
        patient.started(f"r{i}")
    patient.sent(request("long", prompt=4000), "0")
    unbound = patient.place(request("new"), 0.0)
    assert unbound is not None
    assert unbound.instance_id == "0"


def test_what_breaks_the_objectives_is_only_told_where_it_is_to_be_within_them() -> None:
    brain = dispatcher(slo_tpt_ms=1.0)
    told = brain.place(request("a"), 0.0, within_slo=True)
    assert told is not None
    assert told.breaks_slo
    assert brain.place_of("a") is None
    assert not brain.fleet.num_requests.any()
    assert brain.place(request("a"), 0.0) is not None
    assert brain.place_of("a") == "0"


@pytest.mark.parametrize("objective", ["slo_tpt_ms", "slo_ttft_ms"])
def test_batch_requests_leave_a_share_of_the_objectives(objective: str) -> None:
    """Up to a fifth below them; interactive ones go on up to them."""
    index = 0 if objective == "slo_tpt_ms" else 1
    limit_ms = predicted(4)[index] * 1.001
    brain = dispatcher(slo_tpt_ms=limit_ms) if index == 0 else dispatcher(slo_ttft_ms=limit_ms)
    num_batch = 0
    while brain.place_of(f"b{num_batch - 1}") is not None or not num_batch:
        brain.place(request(f"b{num_batch}", has_time=True), 0.0)
        if brain.place_of(f"b{num_batch}") is not None:
            brain.started(f"b{num_batch}")
        num_batch += 1
    num_batch -= 1
    assert num_batch < 5
    last = predicted(max(0, num_batch - 1))[index]
    assert num_batch == 1 or last <= BATCH_SHARE * limit_ms
    assert predicted(num_batch)[index] > BATCH_SHARE * limit_ms
    for i in range(num_batch, 5):
        choice = brain.place(request(f"i{i}"), 0.0)
        assert choice is not None
        assert not choice.breaks_slo
        brain.started(f"i{i}")


def test_an_idle_server_takes_a_batch_request_that_breaks_the_objectives() -> None:
    brain = dispatcher(num=2, slo_tpt_ms=1.0)
    placed = [brain.place(request(name, has_time=True), 0.0) for name in "abc"]
    assert [brain.place_of(name) is not None for name in "abc"] == [True, True, False]
    assert all(choice is not None for choice in placed)


def test_without_objectives_no_batch_request_has_to_wait() -> None:
    brain = dispatcher()
    for i in range(8):
        brain.place(request(f"b{i}", has_time=True), 0.0)
        assert brain.place_of(f"b{i}") == "0"


def test_classes_by_header_and_tenant() -> None:
    assert [is_batch(asked) for asked in (None, INTERACTIVE, BATCH)] == [False, False, True]
    assert [is_batch(asked, BATCH) for asked in (None, INTERACTIVE, BATCH)] == [True, True, True]
    assert [is_batch(asked) for asked in (" Batch", "", " ")] == [True, False, False]
    with pytest.raises(ValueError, match="is 'bulk'; it must be interactive or batch"):
        is_batch("bulk")


# --- who waits ---


def test_tenants_are_in_turn_by_their_weights_and_a_tenants_models_too() -> None:
    held = Held[str]()
    for i in range(8):
        held.add(f"a{i}", "a", "m", 1.0)
        held.add(f"b{i}", "b", "m" if i % 2 else "n", 3.0)
    placed: list[str] = []

    def place(request: str) -> bool:
        placed.append(request)
        return len(placed) <= 8

    held.look(place)
    assert [name[0] for name in placed[:8]].count("b") == 6
    assert [name for name in placed if name[0] == "a"] == ["a0", "a1", "a2"][: len(placed) - 6]
    assert len(held) == 8


@pytest.mark.parametrize("others", [(), ("stuck",)])
def test_a_small_weight_gets_what_nobody_else_can_use(others: tuple[str, ...]) -> None:
    held = Held[str]()
    for name in others:
        held.add(name, name, "m", 1e6)
    held.add("small", "small", "m", 1e-6)
    held.look(lambda request: request == "small")
    assert len(held) == len(others)


def test_a_model_without_room_takes_no_look_from_the_others() -> None:
    held = Held[str]()
    for i in range(50):
        held.add(f"x{i}", "", f"stuck {i}")
    held.add("y", "", "free")
    num_looks = 0
    while held.has("", "free"):
        held.look(lambda request: request == "y")
        num_looks += 1
    assert num_looks <= 1 + 50 / MAX_TRIED
    held.discard("x3", "", "stuck 3")
    held.discard("x3", "", "stuck 3")
    assert len(held) == 49
    assert len(held.pop_all()) == 49
    assert not len(held)


def test_what_a_batch_request_did_not_use_is_free_again() -> None:
    """One that was over at once, whatever was predicted of it."""
    brain = dispatcher(slo_tpt_ms=200.0)
    brain.place(request("huge", prompt=10**6, has_time=True), 0.0)
    brain.place(request("running"), 0.0)
    brain.started("running")
    brain.place(request("kept out", has_time=True), 1.0)
    assert brain.place_of("kept out") is None
    brain.ended("huge", now=0.2)
    brain.place(request("next", has_time=True), 1.0)
    assert brain.place_of("next") == "0"


# --- through a router ---

AWARE = {"policy": "rank_aware", "slo_tpt_ms": 1e-3}
"""An objective that no server keeps but an idle one for batch requests."""


async def complete(
    client: Client, headers: dict[str, str], model: str = "small", prompt: str = "x"
) -> tuple[int, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 2}
    async with client.call("POST", "/v1/completions", body, headers=headers) as response:
        return response.status, await response.json()


@asynccontextmanager
async def busy(
    start_router: Start, **settings: Any
) -> AsyncIterator[tuple[Client, FakeVllm, asyncio.Task[Any]]]:
    """A router with one server, which answers an interactive request until `max_sent` is None."""
    server = FakeVllm()
    server.behaviour.max_sent = 0
    with serving(server) as url:
        async with start_router(url, **AWARE, **settings) as client:
            interactive = asyncio.create_task(complete(client, {}))
            await until(lambda: len(server.seen) == 1)
            yield client, server, interactive
            server.behaviour.max_sent = None
            assert (await interactive)[0] == 200


async def held(client: Client, num: int) -> None:
    await until(lambda: len(client.router.state.holding) == num)


async def test_an_interactive_request_is_refused_early(start_router: Start) -> None:
    server = FakeVllm()
    settings = {"policy": "rank_aware", "slo_ttft_ms": 1e-3}
    with serving(server) as url:
        async with start_router(url, slo_admission="on", **settings) as client:
            async with client.complete(stream=True) as response:
                body = await response.json()
            assert (response.status, body["error"]["code"]) == (429, "slo_unattainable")
            assert int(response.headers["Retry-After"]) >= 1
            assert "time until the first token" in body["error"]["message"]
            assert server.seen == []
            async with client.call("GET", "/metrics") as response:
                metrics = await response.text()
            assert 'toppings_router_slo_refused_total{slo_class="interactive"} 1.0' in metrics
            assert 'toppings_router_rejected_total{reason="objectives"} 1.0' in metrics
        async with start_router(url, **settings) as client, client.complete() as response:
            assert (response.status, response.headers["X-Toppings-SLO"]) == (200, "at-risk")


async def test_a_class_that_there_is_not_is_refused(start_router: Start) -> None:
    with serving(FakeVllm()) as url:
        async with start_router(url) as client:
            status, body = await complete(client, {SLO_CLASS_HEADER: "bulk"})
    assert status == 400
    assert "interactive or batch" in body["error"]["message"]


async def test_batch_requests_wait_for_room_and_are_all_served(start_router: Start) -> None:
    async with busy(start_router) as (client, server, interactive):
        batch = [asyncio.create_task(complete(client, BATCH_HEADERS)) for _ in range(20)]
        await held(client, 20)
        assert len(server.seen) == 1
        server.behaviour.max_sent = None
        assert {status for status, _ in await asyncio.gather(interactive, *batch)} == {200}
        told = [headers.get(SLO_CLASS_HEADER.lower()) for headers in server.headers]
        assert told == [None, *[BATCH] * 20]
        assert not len(client.router.state.holding)


async def test_a_held_request_whose_client_leaves_is_forgotten(start_router: Start) -> None:
    async with busy(start_router) as (client, server, _):
        leaving, staying = (asyncio.create_task(complete(client, BATCH_HEADERS)) for _ in range(2))
        await held(client, 2)
        leaving.cancel()
        await held(client, 1)
        server.behaviour.max_sent = None
        assert (await staying)[0] == 200
        assert len(server.seen) == 2


async def test_a_batch_request_waits_for_so_long(start_router: Start) -> None:
    async with busy(start_router, batch_wait_s=0.05) as (client, server, _):
        status, body = await complete(client, BATCH_HEADERS)
        assert (status, body["error"]["code"]) == (429, "slo_unattainable")
        assert len(server.seen) == 1


async def test_a_router_that_stops_answers_what_it_holds(start_router: Start) -> None:
    async with busy(start_router) as (client, _, _):
        waiting = asyncio.create_task(complete(client, BATCH_HEADERS))
        await held(client, 1)
        await client.router.state.holding.close()
        assert (await waiting)[0] == 503


async def test_requests_for_a_model_without_room_keep_back_no_others(start_router: Start) -> None:
    """Nor for one whose only server has gone: these are told so."""
    busy_server, other = FakeVllm({"small": 8}), FakeVllm({"other": 8})
    busy_server.behaviour.max_sent = 0
    with serving(busy_server) as first, serving(other) as second:
        async with start_router(first, second, **AWARE) as client:
            interactive = asyncio.create_task(complete(client, {}))
            await until(lambda: len(busy_server.seen) == 1)
            held_back = [asyncio.create_task(complete(client, BATCH_HEADERS)) for _ in range(20)]
            await held(client, 20)
            assert (await complete(client, BATCH_HEADERS, "other"))[0] == 200
            busy_server.behaviour.is_healthy = False
            assert {status for status, _ in await asyncio.gather(*held_back)} == {503}
            busy_server.behaviour.max_sent = None
            await interactive


async def test_no_more_are_held_than_may_be(start_router: Start) -> None:
    async with busy(start_router, max_held=3, max_buffered_bytes=2000) as (client, server, _):
        waiting = [asyncio.create_task(complete(client, BATCH_HEADERS)) for _ in range(3)]
        await held(client, 3)
        status, body = await complete(client, BATCH_HEADERS)
        assert (status, body["error"]["code"]) == (429, "slo_unattainable")
        assert "at most 3 may" in body["error"]["message"]
        waiting.pop().cancel()
        await held(client, 2)
        status, body = await complete(client, BATCH_HEADERS, prompt="x" * 900)
        assert (status, body["error"]["code"]) == (429, "slo_unattainable")
        server.behaviour.max_sent = None
        assert (await complete(client, {}, prompt="x" * 900))[0] == 200
        assert {status for status, _ in await asyncio.gather(*waiting)} == {200}


async def test_a_tenant_of_batch_requests_has_no_others(start_router: Start, tmp_path: Path) -> None:
    file = tmp_path / "tenants.yaml"
    file.write_text("tenants:\n  nightly: {use: ['*'], slo_class: batch}\n")
    key = add_key(file, "nightly").text
    headers = {"Authorization": f"Bearer {key}", SLO_CLASS_HEADER: INTERACTIVE}
    server = FakeVllm()
    with serving(server) as url:
        async with start_router(url, tenants_file=str(file), **AWARE) as client:
            assert (await complete(client, headers))[0] == 200
    assert server.headers[0][SLO_CLASS_HEADER.lower()] == BATCH
