"""The router keeps adapters on some servers: plans are made beside requests, and requests follow them."""

import asyncio
from collections import Counter
from contextlib import ExitStack

import pytest

from tests.cluster.conftest import Client, Start
from tests.cluster.fakes import FakeToppings, FakeVllm, serving
from tests.waiting import until
from toppings.cluster.placement import Plan
from toppings.cluster.placement.plan import Ring
from toppings.cluster.router.orders import MAX_ORDERS
from toppings.cluster.router.settings import InstanceConfig
from toppings.cluster.snapshot import RequestSnapshot

FAST = {"placement_interval_s": 0.05, "policy": "round_robin"}


def plan_of(client: Client) -> Plan:
    plan = client.router.state.dispatcher.plan
    assert plan is not None
    return plan


async def ask(client: Client, num: int, model: str = "small") -> None:
    for _ in range(num):
        async with client.complete(model) as response:
            assert response.status == 200


def num_seen(servers: list[FakeVllm], model: str = "small") -> list[int]:
    return [Counter(server.seen)[model] for server in servers]


async def test_an_adapter_stays_on_its_server_until_that_goes_down(start_router: Start) -> None:
    servers = [FakeVllm() for _ in range(3)]
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(server)) for server in servers]
        async with start_router(*urls, placement="static_k", num_copies=1, **FAST) as client:
            await until(lambda: len(plan_of(client).instance_ids) == 3)
            await ask(client, 6)
            await ask(client, 6, "base")
            assert sorted(num_seen(servers)) == [0, 0, 6]
            assert sum(num_seen(servers, "base")) == 6
            assert max(num_seen(servers, "base")) == 2  # the base model is everywhere
            home = num_seen(servers).index(6)
            servers[home].behaviour.is_healthy = False
            await until(lambda: f"s{home}" not in plan_of(client).instance_ids)
            await ask(client, 6)
            assert sorted(num_seen(servers)) == [0, 6, 6]


async def test_a_hot_adapter_gets_homes_from_what_it_is_asked_for(start_router: Start) -> None:
    """Beside a server that tells how many bytes fit, and one that tells nothing of room."""
    servers = [FakeToppings(), FakeVllm()]
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(server)) for server in servers]
        async with start_router(*urls, placement="adaptive", **FAST) as client:
            await ask(client, 20)
            await until(lambda: plan_of(client).homes_of("small") != ())
            assert set(plan_of(client).homes_of("small")) == {"s0", "s1"}
            assert plan_of(client).homes_of("large") == ()
            await ask(client, 4, "large")
            assert client.outcomes() == {"answered": 24}


async def test_servers_read_ahead_what_is_given_a_home_there_and_is_not_there(start_router: Start) -> None:
    """Of servers that hold nothing, both are told; a plan that changes nothing tells nobody."""
    servers = [FakeToppings({"org/a b": 8}), FakeToppings({"org/a b": 8})]
    for server in servers:
        server.extra_stats = {"on_device": [], "on_host": []}
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(server)) for server in servers]
        settings = {**FAST, "placement_interval_s": 3600.0, "placement": "adaptive", "policy": "first_fit"}
        async with start_router(*urls, **settings) as client:
            await ask(client, 3, "org/a b")
            used = client.router.state.dispatcher.fleet
            await until(lambda: not any(used.on_device))  # reported after the last request has ended
            await client.router.monitor.plan()
            assert set(plan_of(client).homes_of("org/a b")) == {"s0", "s1"}
            assert [server.prefetched for server in servers] == [["org/a b"]] * 2
            await client.router.monitor.plan()
            assert [len(server.prefetched) for server in servers] == [1, 1]


async def test_what_servers_are_not_told_of_a_plan_they_are_told_with_the_next(start_router: Start) -> None:
    names = [f"a{i:02}" for i in range(MAX_ORDERS + 3)]
    server = FakeToppings(dict.fromkeys(names, 8), extra_stats={"on_device": [], "on_host": []})
    with serving(server) as url:
        async with start_router(url, **ORDERED) as client:
            homes = dict.fromkeys(names, ("s0",))
            await carry_out(client, **homes)
            assert sorted(server.prefetched) == names[:MAX_ORDERS]
            await carry_out(client, **homes)
            assert sorted(server.prefetched) == names
            await carry_out(client, **homes)
            assert len(server.prefetched) == len(names)


async def test_a_plan_that_fails_is_logged_and_the_next_one_is_made(
    start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(FakeVllm()) as url:
        async with start_router(url, placement="static_k", **FAST) as client:
            dispatcher = client.router.state.dispatcher
            placement, dispatcher.placement = dispatcher.placement, None  # its assertion fails
            await until(lambda: "placement failed" in caplog.text)
            dispatcher.placement, dispatcher.plan = placement, Plan((), plan_of(client).rule)
            await until(lambda: plan_of(client).instance_ids == ("s0",))


async def test_without_a_placement_there_is_no_plan_but_a_number_of_servers(start_router: Start) -> None:
    with serving(FakeVllm()) as url:
        async with start_router(url, placement_interval_s=0.05) as client:
            await ask(client, 1)
            assert client.router.state.dispatcher.plan is None

            async def told() -> str:
                async with client.call("GET", "/metrics") as response:
                    text: str = await response.text()
                    return text

            while "toppings_router_desired_instances 1.0" not in await told():
                await asyncio.sleep(0.01)


# --- servers that have only some adapters ---


def vllm(*names: str, limit: int = 1000) -> FakeVllm:
    return FakeVllm(dict.fromkeys(names, 8), max_cpu_loras=limit)


ORDERED = {"policy": "least_loaded", "placement": "adaptive", "placement_interval_s": 3600.0}


async def carry_out(client: Client, **homes: tuple[str, ...]) -> None:
    """Obey a plan, to the end of what it orders."""
    plan = Plan(tuple(client.router.state.fleet.ids), Ring((), 0), homes)
    orders = client.router.monitor.orders
    await orders.give(plan)
    client.router.state.dispatcher.plan = plan
    while orders.loads:
        await asyncio.wait(orders.loads)


def loads(server: FakeVllm) -> list[tuple[str, str]]:
    """What it was told: loads with their path, unloads without."""
    return [(call["lora_name"], call.get("lora_path", "")) for call in server.admin_calls]


async def test_a_server_gets_the_adapters_that_have_a_home_there_and_then_their_requests(
    start_router: Start,
) -> None:
    servers = [vllm("small"), vllm("large")]
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(server)) for server in servers]
        async with start_router(*urls, **ORDERED) as client:
            await ask(client, 2)
            assert num_seen(servers) == [2, 0]
            await carry_out(client, small=("s1",), large=("s1",), unknown=("s0",))
            assert loads(servers[1]) == [("small", "/adapters/small")]
            assert servers[0].admin_calls == []
            await ask(client, 2)
            assert num_seen(servers) == [2, 2]
            await carry_out(client, small=("s1",))
            assert len(servers[1].admin_calls) == 1


async def test_nothing_is_loaded_that_does_not_fit_and_what_has_no_home_makes_place(
    start_router: Start,
) -> None:
    """The second server holds two: one is its own, so that one may be placed there at a time."""
    servers = [vllm("a", "b", "c", "d"), vllm("own", limit=2)]
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(server)) for server in servers]
        few = InstanceConfig.of({"url": urls[1], "id": "few", "max_cpu_loras": 2})
        async with start_router(urls[0], few, **ORDERED) as client:
            await carry_out(client, a=("few",), b=("few",))
            await carry_out(client, a=("few",), b=("few",))
            assert loads(servers[1]) == [("a", "/adapters/a")]
            await carry_out(client, b=("few",))
            assert loads(servers[1])[1:] == [("a", ""), ("b", "/adapters/b")]
            assert set(servers[1].adapters) == {"own", "b"}
            state = client.router.state
            request = RequestSnapshot("long", "b", 8, 8, 8.0)
            state.dispatcher.sent(request, "few")  # in use: it stays
            await carry_out(client, c=("few",))
            assert set(servers[1].adapters) == {"own", "b"}
            state.dispatcher.ended("long")
            await carry_out(client, c=("few",))
            assert set(servers[1].adapters) == {"own", "c"}


async def test_a_server_of_unknown_room_or_that_refuses_is_left_alone(start_router: Start) -> None:
    """It tells of four; the first has four already, the other refuses and is asked once."""
    full, refusing = vllm("a", "b", "c", "d"), vllm("e")
    refusing.refuses_loads = True
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(server)) for server in (full, refusing)]
        async with start_router(*urls, **ORDERED) as client:
            for _ in range(2):
                await carry_out(client, a=("s1",), e=("s0",))
            assert full.admin_calls == []
            assert len(refusing.admin_calls) == 1
            client.router.state.fleet.set_limits("s0", max_adapters=float("inf"))
            del full.adapters["a"]
            await carry_out(client, e=("s0",))
            assert full.admin_calls == []


async def test_what_the_administration_loads_and_unloads_is_not_placed(start_router: Start) -> None:
    servers = [vllm("a", limit=9), vllm(limit=9)]
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(server)) for server in servers]
        async with start_router(*urls, **ORDERED) as client:
            async with client.call("POST", "/v1/unload_lora_adapter", {"lora_name": "a"}) as response:
                assert response.status == 200
            servers[0].adapters["a"] = 8  # somebody brings it back by hand
            await client.router.monitor.check(client.router.state.upstreams["s0"])
            servers[1].admin_calls.clear()
            await carry_out(client, a=("s1",))
            assert [call for call in servers[1].admin_calls if "lora_path" in call] == []
