"""Adapters and instances, administered through the router."""

import asyncio
import json
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import openai
import pytest

from tests.cluster.conftest import Client, Start
from tests.cluster.fakes import FakeVllm, serving
from tests.waiting import until
from toppings.cluster.router.memory import AdapterMemory
from toppings.cluster.router.settings import InstanceConfig
from toppings.cluster.router.upstream import Health

NEW = {"lora_name": "new", "lora_path": "/adapters/new"}


async def change(client: Client, verb: str, body: object) -> tuple[int, str]:
    async with client.call("POST", f"/v1/{verb}_lora_adapter", body) as response:
        return response.status, await response.text()


@pytest.mark.parametrize(
    "url",
    [
        *("http://" + "a" * 64 + ":80", "http://a..b", "http://.", "http://-a", 'http://a"b', "http://a_b-"),
        *("http://" + ".".join(["a" * 60] * 5), "http://[::g]"),
    ],
)
async def test_a_host_that_cannot_be_looked_up_is_refused_and_changes_nothing(
    two_servers: Any, start_router: Start, url: str
) -> None:
    (_, first), _ = two_servers
    async with start_router(first) as client:
        async with client.call("POST", "/instances", {"url": url}) as response:
            assert (response.status, "instance url is" in await response.text()) == (400, True)
        assert list(client.router.state.upstreams) == ["s0"]
        async with client.complete("nowhere") as response:
            assert response.status == 404


@pytest.mark.parametrize(
    "url", ["http://a_b.svc:80", "http://a.b.", "http://[::1]:9", "http://10.0.0.1", "https://A-1"]
)
def test_hosts_of_clusters_are_taken(url: str) -> None:
    assert InstanceConfig(url=url).url == url


async def test_a_call_that_fails_in_whatever_way_is_a_failure_of_its_server(
    two_servers: Any, start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a name cannot be encoded to be looked up."""
    (_, first), _ = two_servers
    async with start_router(first) as client:
        error = UnicodeError("encoding with 'idna' codec failed")
        monkeypatch.setattr(client.router.state.session, "_request", AsyncMock(side_effect=error))
        monkeypatch.setattr(client.router.state.session, "post", AsyncMock(side_effect=error))
        async with client.complete("small") as response:
            assert response.status == 503
        upstream = client.router.state.upstreams["s0"]
        assert await upstream.check_health() is Health.SILENT


async def test_a_router_is_no_instance_of_itself(two_servers: Any, start_router: Start) -> None:
    (_, first), _ = two_servers
    async with start_router(first) as client:
        for _ in range(2):
            async with client.call("POST", "/instances", {"url": client.url, "id": "self"}) as response:
                assert (response.status, "this router itself" in await response.text()) == (400, True)
        await until(lambda: list(client.router.state.upstreams) == ["s0"])
        assert (await change(client, "load", NEW))[0] == 200


async def test_a_merge_is_refused_before_any_server_is_asked(two_servers: Any, start_router: Start) -> None:
    (_, first), _ = two_servers
    async with start_router(first) as client:
        status, text = await change(client, "load", {"lora_name": "mix", "merge": {"adapters": []}})
        assert (status, "send it to the servers themselves" in text) == (400, True)
        assert (await change(client, "unload", {"lora_name": "mix"}))[0] == 404


async def test_loaded_adapter_is_on_every_server_and_served(two_servers: Any, start_router: Start) -> None:
    (one, first), (other, second) = two_servers
    async with start_router(first, second) as client:
        answer = await change(client, "load", NEW)
        assert answer == (200, "Success: LoRA adapter 'new' added successfully.")
        assert "new" in one.adapters
        assert "new" in other.adapters
        api = openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none")
        assert "new" in [model.id async for model in api.models.list()]
        assert (await api.completions.create(model="new", prompt="x")).model == "new"


async def test_unloaded_adapter_is_on_no_server(two_servers: Any, start_router: Start) -> None:
    (one, first), (other, second) = two_servers
    async with start_router(first, second) as client:
        assert await change(client, "unload", {"lora_name": "small"}) == (
            200,
            "Success: LoRA adapter 'small' removed successfully.",
        )
        assert "small" not in one.adapters
        assert "small" not in other.adapters
        async with client.complete("small") as response:
            assert response.status == 404


async def test_refusal_is_passed_on_and_changes_nothing(two_servers: Any, start_router: Start) -> None:
    (_, first), (_, second) = two_servers
    async with start_router(first, second) as client:
        assert (await change(client, "load", {**NEW, "lora_path": "/missing"}))[0] == 404
        again = await change(client, "load", {**NEW, "lora_name": "small"})
        assert again[0] == 400
        assert "already been loaded" in again[1]
        assert (await change(client, "unload", {"lora_name": "zzz"}))[0] == 404


async def test_load_that_one_server_refuses_is_undone_on_the_other(
    two_servers: Any, start_router: Start
) -> None:
    (one, first), (other, second) = two_servers
    other.refuses_loads = True
    async with start_router(first, second) as client:
        assert (await change(client, "load", NEW))[0] == 404
    assert one.admin_calls == [NEW, {"lora_name": "new"}]
    assert "new" not in one.adapters


async def test_load_repeated_after_half_of_it_was_done_completes(
    two_servers: Any, start_router: Start
) -> None:
    (one, first), (other, second) = two_servers
    one.adapters["new"] = 16
    async with start_router(first, second) as client:
        assert (await change(client, "load", NEW))[0] == 200
    assert "new" in other.adapters


async def test_server_that_comes_back_gets_what_it_missed(two_servers: Any, start_router: Start) -> None:
    (_, first), (other, second) = two_servers
    async with start_router(first, second) as client:
        upstream = client.router.state.upstreams["s1"]
        await change(client, "load", {**NEW, "lora_name": "kept"})
        other.behaviour.is_healthy = False
        await until(lambda: not upstream.is_alive)
        await change(client, "load", NEW)
        await change(client, "load", {**NEW, "lora_name": "kept", "load_inplace": True})
        await change(client, "unload", {"lora_name": "small"})
        assert "new" not in other.adapters
        other.admin_calls.clear()
        other.behaviour.is_healthy = True
        await until(lambda: upstream.is_alive)
    assert sorted(other.adapters) == ["kept", "large", "new"]
    kept = {**NEW, "lora_name": "kept", "load_inplace": True}
    assert other.admin_calls == [kept, NEW, {"lora_name": "small"}]


async def test_an_unload_is_remembered_until_every_server_has_done_it(
    two_servers: Any, start_router: Start, tmp_path: Path
) -> None:
    (_, first), (other, second) = two_servers
    file = tmp_path / "adapters.json"
    async with start_router(first, second, state_file=str(file)) as client:
        upstreams = client.router.state.upstreams
        for name in ("new", "newer"):
            assert (await change(client, "load", {**NEW, "lora_name": name}))[0] == 200
        assert (await change(client, "unload", {"lora_name": "newer"}))[0] == 200
        other.behaviour.is_healthy = False
        await until(lambda: not upstreams["s1"].is_alive)
        assert (await change(client, "unload", {"lora_name": "new"}))[0] == 200
        assert list(json.loads(file.read_text())) == ["new"]
        other.behaviour.is_healthy = True
        await until(lambda: json.loads(file.read_text()) == {})
        await until(lambda: upstreams["s1"].is_alive)
        assert "new" not in other.adapters
        assert [upstream.applied for upstream in upstreams.values()] == [{}, {}]
        assert (await change(client, "load", NEW))[0] == 200
        assert "new" in other.adapters


async def test_changes_that_come_together_are_all_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "adapters.json"
    memory = AdapterMemory(str(file))
    names = [f"adapter-{i}" for i in range(50)]
    await asyncio.gather(*(memory.note(name, {"lora_path": name}) for name in names))
    assert AdapterMemory(str(file)).names() == names
    await asyncio.gather(*(memory.drop(name) for name in names))
    assert AdapterMemory(str(file)).names() == []


async def test_restarted_router_remembers_what_was_loaded(start_router: Start, tmp_path: Path) -> None:
    state_file = str(tmp_path / "adapters.json")
    with serving(FakeVllm()) as url:
        async with start_router(url, state_file=state_file) as client:
            assert (await change(client, "load", NEW))[0] == 200
    fresh = FakeVllm()
    with serving(fresh) as url:
        async with start_router(url, state_file=state_file) as client:
            assert client.router.state.is_known("new")
    assert "new" in fresh.adapters


async def test_drained_server_finishes_but_gets_nothing_new(two_servers: Any, start_router: Start) -> None:
    (one, first), (other, second) = two_servers
    one.behaviour.max_sent = 1
    async with (
        start_router(first, second, policy="first_fit") as client,
        client.complete(stream=True, max_tokens=6) as response,
    ):
        await response.content.readany()
        assert (await client.json("POST", "/instances/s0/drain"))["is_draining"]
        async with client.complete() as later:
            assert later.headers["X-Toppings-Instance"] == "s1"
        one.behaviour.max_sent = None
        assert (await response.read()).endswith(b"data: [DONE]\n\n")
    assert (len(one.seen), len(other.seen)) == (1, 1)


async def test_removed_server_is_forgotten_when_its_last_request_ended(
    two_servers: Any, start_router: Start
) -> None:
    (one, first), (_, second) = two_servers
    one.behaviour.max_sent = 1
    async with start_router(first, second, policy="first_fit") as client:
        async with client.complete(stream=True, max_tokens=6) as response:
            await response.content.readany()
            async with client.call("DELETE", "/instances/s0") as removed:
                assert removed.status == 202
            await asyncio.sleep(0.1)
            assert "s0" in client.router.state.upstreams
            one.behaviour.max_sent = None
            await response.read()
        await until(lambda: "s0" not in client.router.state.upstreams)
        async with client.call("GET", "/metrics") as metrics:
            assert 'server="s0"' not in await metrics.text()
        assert [i["id"] for i in (await client.json("GET", "/instances"))["instances"]] == ["s1"]


async def test_added_server_serves_with_the_adapters_of_the_fleet(start_router: Start) -> None:
    later = FakeVllm(adapters={})
    with serving(FakeVllm()) as first, serving(later) as second:
        async with start_router(first) as client:
            await change(client, "load", NEW)
            added = await client.json("POST", "/instances", {"url": second, "id": "later"})
            assert (added["id"], added["is_alive"]) == ("later", True)
            assert "new" in later.adapters


async def test_bad_instance_is_refused(two_servers: Any, start_router: Start) -> None:
    (_, first), (_, second) = two_servers
    async with start_router(first) as client:
        for body, status in (({"url": "nonsense"}, 400), ({"url": second, "id": "s0"}, 409), ([1], 400)):
            async with client.call("POST", "/instances", body) as response:
                assert response.status == status
        async with client.call("POST", "/instances/nobody/drain") as response:
            assert response.status == 404
