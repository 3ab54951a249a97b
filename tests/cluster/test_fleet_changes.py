"""Changes of adapters while servers are slow, hang or fall silent."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tests.cluster.conftest import Client, Start
from tests.cluster.fakes import FakeToppings, FakeVllm, serving
from tests.cluster.test_administration import NEW, change
from tests.waiting import PATIENCE_S, until


class Draining(FakeToppings):
    """Unloads when `gate` is opened: an adapter's last request still streams."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.is_open, self.num_waiting, self.num_checks = False, 0, 0

    async def unload(self, request: Request) -> Response:
        self.num_waiting += 1
        while not self.is_open:
            await asyncio.sleep(0.01)
        return await super().unload(request)

    async def health(self, request: Request) -> Response:
        self.num_checks += 1
        return await super().health(request)


class Listing(FakeVllm):
    """Holds back the next `num_to_hold` lists of its models, as they were then, until it `is_open`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.num_to_hold, self.num_held, self.is_open = 0, 0, False

    async def models(self, request: Request) -> Response:
        answer = await super().models(request)
        if self.num_held < self.num_to_hold:
            self.num_held += 1
            while not self.is_open:
                await asyncio.sleep(0.01)
        return answer


def _upstream(client: Client, name: str) -> Any:
    return client.router.state.upstreams[name]


async def test_checks_go_on_while_a_server_drains(start_router: Start) -> None:
    draining, other = Draining(), FakeToppings()
    with serving(draining) as first, serving(other) as second:
        async with start_router(first, second) as client:
            task = asyncio.create_task(change(client, "unload", {"lora_name": "small"}))
            await until(lambda: draining.num_waiting)
            num_checks = draining.num_checks
            await until(lambda: draining.num_checks > num_checks + 2)
            other.behaviour.is_healthy = False
            await until(lambda: not _upstream(client, "s1").is_alive)
            other.behaviour.is_healthy = True
            await until(lambda: _upstream(client, "s1").is_alive)
            assert not task.done()
            draining.is_open = True
            assert (await task)[0] == 200


async def test_what_is_being_unloaded_is_not_loaded_again_meanwhile(start_router: Start) -> None:
    """One server is done, the other is not yet: the first one is looked at again before all is done."""
    draining, other = Draining(), FakeVllm()
    with serving(draining) as first, serving(other) as second:
        async with start_router(first, second) as client:
            assert (await change(client, "load", NEW))[0] == 200
            upstream = _upstream(client, "s1")
            task = asyncio.create_task(change(client, "unload", {"lora_name": "new"}))
            await until(lambda: "new" not in other.adapters and draining.num_waiting)
            await client.router.admin.sync(upstream)
            draining.is_open = True
            assert (await task)[0] == 200
            assert [call["lora_name"] for call in other.admin_calls] == ["new", "new"]
            assert "new" not in draining.adapters
            assert "new" not in other.adapters


async def test_a_server_that_a_change_does_not_reach_follows_at_once(start_router: Start) -> None:
    """It comes up while the change goes on at the other one."""
    draining, late = Draining(), FakeVllm()
    late.behaviour.is_healthy = False
    with serving(draining) as first, serving(late) as second:
        async with start_router(first, second, sync_interval_s=600.0) as client:
            task = asyncio.create_task(change(client, "unload", {"lora_name": "small"}))
            await until(lambda: draining.num_waiting)
            late.behaviour.is_healthy = True
            await until(lambda: _upstream(client, "s1").is_alive)
            assert "small" in late.adapters
            draining.is_open = True
            assert (await task)[0] == 200
            await until(lambda: "small" not in late.adapters)


async def test_a_server_that_is_looked_at_before_a_change_is_over_follows_at_once(
    start_router: Start,
) -> None:
    """It comes up when the other one has done the change, and is asked what it has now."""
    changed, late = Listing(), FakeVllm()
    late.behaviour.is_healthy = False
    with serving(changed) as first, serving(late) as second:
        async with start_router(first, second, sync_interval_s=600.0) as client:
            changed.num_to_hold = 1
            task = asyncio.create_task(change(client, "unload", {"lora_name": "small"}))
            await until(lambda: changed.num_held)
            late.behaviour.is_healthy = True
            await until(lambda: _upstream(client, "s1").is_alive)
            assert "small" in late.adapters
            changed.is_open = True
            assert (await task)[0] == 200
            await until(lambda: "small" not in late.adapters)


async def test_a_server_that_hangs_keeps_no_change_from_the_others(start_router: Start) -> None:
    hanging, other = Draining(), FakeVllm()
    with serving(hanging) as first, serving(other) as second:
        async with start_router(first, second) as client:
            client.limit("s0", admin_timeout_s=0.5)
            status, text = await change(client, "unload", {"lora_name": "small"})
            assert status == 200
            assert "Not yet on s0 (no answer in 0.5 s)" in text
            assert "small" not in other.adapters
            hanging.is_open = True
            await until(lambda: "small" not in hanging.adapters)


async def test_where_no_server_answers_a_change_is_504(start_router: Start) -> None:
    with serving(Draining()) as url:
        async with start_router(url, admin_timeout_s=0.3) as client:
            status, text = await change(client, "unload", {"lora_name": "small"})
            assert status == 504
            assert "s0: no answer in 0.3 s" in text


async def test_changes_of_different_servers_adapters_go_on_beside_each_other(start_router: Start) -> None:
    draining, other = Draining(), FakeVllm()
    with serving(draining) as first, serving(other) as second:
        async with start_router(first, second) as client:
            task = asyncio.create_task(change(client, "unload", {"lora_name": "small"}))
            await until(lambda: draining.num_waiting)
            loading = asyncio.create_task(change(client, "load", NEW))
            await until(lambda: "new" in other.adapters)
            assert not task.done()
            draining.is_open = True
            assert [(await each)[0] for each in (task, loading)] == [200, 200]
            assert "new" in draining.adapters


async def test_a_change_ends_when_its_server_goes_down(start_router: Start) -> None:
    hanging, other = Draining(), FakeVllm()
    with serving(hanging) as first, serving(other) as second:
        async with start_router(first, second, admin_timeout_s=PATIENCE_S) as client:
            client.limit("s0", health_timeout_s=0.5)
            task = asyncio.create_task(change(client, "unload", {"lora_name": "small"}))
            await until(lambda: hanging.num_waiting)
            hanging.behaviour.mode = "hang"
            status, text = await asyncio.wait_for(task, PATIENCE_S)
            assert status == 200
            assert "Not yet on s0 (it went down)" in text


async def test_a_change_goes_on_when_its_client_leaves(start_router: Start) -> None:
    draining = Draining()
    with serving(draining) as url:
        async with start_router(url) as client:
            task = asyncio.create_task(change(client, "unload", {"lora_name": "small"}))
            await until(lambda: draining.num_waiting)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.sleep(0.1)
            draining.is_open = True
            await until(lambda: not client.router.state.is_known("small"))


async def test_who_asks_for_a_new_model_while_it_is_looked_for_waits_for_the_look(
    start_router: Start,
) -> None:
    server = Listing()
    with serving(server) as url:
        async with start_router(url, sync_interval_s=600.0) as client:
            server.adapters["new"], server.num_to_hold = 16, 4

            async def ask() -> int:
                async with client.complete("new") as response:
                    return int(response.status)

            asked = [asyncio.create_task(ask())]
            await until(lambda: server.num_held == 1)
            asked += [asyncio.create_task(ask()) for _ in range(3)]
            await until(lambda: client.num_received() == 4)
            server.is_open = True
            assert await asyncio.gather(*asked) == [200] * 4
            assert server.num_held == 1


async def test_a_late_list_of_models_takes_nothing_back(start_router: Start) -> None:
    server = Listing()
    with serving(server) as url:
        async with start_router(url, sync_interval_s=600.0) as client:
            upstream = _upstream(client, "s0")
            server.num_to_hold = 1
            early = asyncio.create_task(upstream.read_cards())
            await until(lambda: server.num_held == 1)
            server.adapters["new"] = 16
            await upstream.read_cards()
            server.is_open = True
            await early
            assert "new" in upstream.cards


async def test_an_added_server_is_watched_though_who_added_it_has_left(start_router: Start) -> None:
    later = FakeVllm()
    later.behaviour.mode = "hang"
    with serving(FakeVllm()) as first, serving(later) as second:
        async with start_router(first) as client:
            adding = asyncio.create_task(client.json("POST", "/instances", {"url": second, "id": "later"}))
            await until(lambda: "later" in client.router.state.upstreams)
            adding.cancel()
            await asyncio.gather(adding, return_exceptions=True)
            later.behaviour.mode = "ok"
            await until(lambda: _upstream(client, "later").is_alive)


async def test_polling_ten_thousand_adapters_does_not_hold_the_loop(start_router: Start) -> None:
    """While a server's whole list is read, others get their turn: no step of the loop takes long."""
    server = FakeToppings(adapters={f"adapter-{i:05}": 8 for i in range(10_000)})
    with serving(server) as url:
        async with start_router(url, health_interval_s=60.0, sync_interval_s=600.0) as client:
            upstream, loop = _upstream(client, "s0"), asyncio.get_running_loop()
            listed = (await upstream.call("GET", "/v1/models", timeout_s=30.0)).body
            turns: list[float] = []

            async def watch() -> None:
                while True:
                    turns.append(loop.time())
                    await asyncio.sleep(0)

            watcher = asyncio.create_task(watch())
            from toppings.cluster.router.cards import read_cards

            cards = await read_cards(listed)
            watcher.cancel()
            assert len(cards.by_name) == 10_001
            assert len(turns) >= 20  # ten thousand in slices of five hundred
