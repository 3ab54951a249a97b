"""Requests through the router over two healthy servers."""

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.cluster.conftest import Start
from tests.cluster.fakes import FakeVllm, serving
from tests.waiting import until


async def test_openai_client_completes_through_the_router(two_servers: Any, start_router: Start) -> None:
    (_, first), (_, second) = two_servers
    async with start_router(first, second) as client:
        api = openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none")
        whole = await api.completions.create(model="small", prompt="hi", max_tokens=3)
        assert (whole.choices[0].text, whole.model) == ("t0 t1 t2", "small")
        chat = await api.chat.completions.create(
            model="large", messages=[{"role": "user", "content": "hi"}], max_tokens=3, stream=True
        )
        assert [chunk.choices[0].delta.content async for chunk in chat] == ["t0 ", "t1 ", "t2 "]


async def test_stream_is_the_servers_own_bytes(two_servers: Any, start_router: Start) -> None:
    (_, first), _ = two_servers
    async with start_router(first) as client:
        async with client.complete(stream=True) as routed:
            through = await routed.read()
        async with client._session.post(
            f"{first}/v1/completions",
            json={"model": "small", "prompt": "hello", "max_tokens": 4, "stream": True},
        ) as direct:
            straight = await direct.read()
    assert _without_times(through) == _without_times(straight)
    assert through.endswith(b"data: [DONE]\n\n")


def _without_times(stream: bytes) -> list[Any]:
    events = stream.decode().split("\n\n")
    parsed = [json.loads(e.removeprefix("data: ")) for e in events if e.startswith("data: {")]
    return [{key: value for key, value in event.items() if key != "created"} for event in parsed]


async def test_tokens_pass_one_by_one_as_they_are_made(start_router: Start) -> None:
    server = FakeVllm()
    server.behaviour.max_sent = 1
    with serving(server) as url:
        async with start_router(url) as client, client.complete(stream=True) as response:
            for i in range(4):
                chunk = await response.content.readany()
                assert f'"t{i} "'.encode() in chunk
                server.behaviour.max_sent = i + 2
            assert (chunk + await response.read()).endswith(b"[DONE]\n\n")


async def test_body_reaches_the_server_byte_for_byte(two_servers: Any, start_router: Start) -> None:
    (server, url), _ = two_servers
    body = b'{ "prompt":"h\xc3\xa9llo" ,"model" : "small","max_tokens":2 }'
    async with start_router(url) as client:
        headers = {"Content-Type": "application/json"}
        async with client._session.post(
            f"{client.url}/v1/completions", data=body, headers=headers
        ) as response:
            assert response.status == 200
    assert server.raw_bodies == [body]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_generate_routes_reach_a_server(two_servers: Any, start_router: Start, path: str) -> None:
    (_, first), (_, second) = two_servers
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 3, "adapter_id": "small"}}
    async with start_router(first, second) as client, client.call("POST", path, body) as response:
        text = await response.text()
    assert response.status == 200
    assert "t2" in text


async def test_models_of_all_servers_are_listed_once(two_servers: Any, start_router: Start) -> None:
    (one, first), (_, second) = two_servers
    one.adapters["only-here"] = 4
    async with start_router(first, second) as client:
        listed = await client.json("GET", "/v1/models")
    assert [card["id"] for card in listed["data"]] == ["base", "small", "large", "only-here"]


async def test_one_model_is_told_by_its_name(two_servers: Any, start_router: Start) -> None:
    (one, first), _ = two_servers
    one.adapters["team/one"] = 4
    async with start_router(first) as client:
        api = openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none")
        assert (await api.models.retrieve("team/one")).id == "team/one"
        with pytest.raises(openai.NotFoundError, match="The model `nope` does not exist"):
            await api.models.retrieve("nope")


async def test_model_of_one_server_is_only_asked_there(two_servers: Any, start_router: Start) -> None:
    (one, first), (other, second) = two_servers
    other.adapters["only-here"] = 4
    async with start_router(first, second) as client:
        for _ in range(4):
            async with client.complete("only-here") as response:
                assert response.status == 200
    assert (one.seen, other.seen) == ([], ["only-here"] * 4)


async def test_unknown_model_is_refused_as_servers_do(two_servers: Any, start_router: Start) -> None:
    (_, first), (_, second) = two_servers
    async with start_router(first, second) as client, client.complete("nope") as response:
        error = (await response.json())["error"]
    assert response.status == 404
    assert error == {
        "message": "The model `nope` does not exist. Valid aliases: base and what GET /v1/models lists.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }


async def test_adapter_loaded_behind_the_routers_back_is_found(two_servers: Any, start_router: Start) -> None:
    (server, url), _ = two_servers
    async with start_router(url, sync_interval_s=1000.0) as client:
        server.adapters["fresh"] = 8
        async with client.complete("fresh") as response:
            assert response.status == 200


@pytest.mark.parametrize(
    ("data", "status"), [(b"{not json", 400), (b'{"prompt": "%s"}' % (b"x" * 3000), 413)]
)
async def test_bad_body_is_refused(two_servers: Any, start_router: Start, data: bytes, status: int) -> None:
    (_, url), _ = two_servers
    async with (
        start_router(url, max_body_bytes=2000) as client,
        client._session.post(f"{client.url}/v1/completions", data=data) as response,
    ):
        assert response.status == status
        assert "message" in (await response.json())["error"]


async def test_ranks_come_from_the_toppings_server(two_servers: Any, start_router: Start) -> None:
    (_, first), (slow, second) = two_servers
    slow.behaviour.first_token_s = 30.0
    async with start_router(first, second) as client:
        client.router.state.upstreams["s0"].is_draining = True
        client.router.state.refresh_open(client.router.state.upstreams["s0"])
        waiting = [asyncio.ensure_future(client.complete(name, stream=True)) for name in ("large", "small")]
        await until(lambda: len(client.router.state.flights) == 2)
        listed = await client.json("GET", "/instances")
        assert [(i["kind"], i["ranks"]) for i in listed["instances"]] == [
            ("toppings", []),
            ("openai", [8, 64]),
        ]
        for task in waiting:
            task.cancel()
        await _settle(client)


async def test_requests_that_came_another_way_count_too(two_servers: Any, start_router: Start) -> None:
    (busy, first), (idle, second) = two_servers
    busy.extra_running_ranks = [64, 64, 8]
    async with start_router(first, second) as client:
        for _ in range(3):
            async with client.complete() as response:
                assert response.headers["X-Toppings-Instance"] == "s1"
    assert (busy.seen, len(idle.seen)) == ([], 3)


async def test_accounts_return_to_zero(two_servers: Any, start_router: Start) -> None:
    (_, first), (_, second) = two_servers
    async with start_router(first, second) as client:
        streams = [client.complete(name, stream=i % 2 == 0) for i, name in enumerate(["small", "large"] * 10)]
        for response in await asyncio.gather(*(stream.__aenter__() for stream in streams)):
            await response.read()
        state = client.router.state
        assert not state.flights
        assert client.outcomes() == {"answered": 20}
        assert client.num_received() == 20


async def test_client_that_leaves_closes_the_servers_stream(two_servers: Any, start_router: Start) -> None:
    (server, url), _ = two_servers
    server.behaviour.token_s = 0.05
    async with start_router(url) as client:
        response = await client.complete(stream=True, max_tokens=1000)
        await response.content.readany()
        response.close()
        await _settle(client)
        await until(lambda: server.num_aborted)
        assert (server.num_aborted, client.outcomes()) == (1, {"abort": 1})


async def _settle(client: Any) -> None:
    await until(lambda: not client.router.state.flights)


async def test_request_no_server_can_keep_in_time_is_marked(two_servers: Any, start_router: Start) -> None:
    (_, url), _ = two_servers
    async with (
        start_router(url, policy="rank_aware", slo_tpt_ms=1.0) as client,
        client.complete() as response,
    ):
        assert response.headers["X-Toppings-SLO"] == "at-risk"


async def test_key_is_asked_of_all_but_health(two_servers: Any, start_router: Start) -> None:
    (_, url), _ = two_servers
    async with start_router(url, api_key="secret") as client:
        statuses = {}
        for path in ("/health", "/ready", "/v1/models", "/metrics", "/instances"):
            async with client.call("GET", path) as response:
                statuses[path] = response.status
        assert list(statuses.values()) == [200, 200, 401, 401, 401]
        async with client.call("GET", "/v1/models", headers={"Authorization": "Bearer secret"}) as response:
            assert response.status == 200


async def test_foreign_web_page_may_not_change_the_fleet(two_servers: Any, start_router: Start) -> None:
    (_, url), _ = two_servers
    headers = {"Origin": "http://evil.example"}
    async with (
        start_router(url) as client,
        client.call("POST", "/instances/s0/drain", headers=headers) as response,
    ):
        assert response.status == 403


async def test_metrics_are_prometheus_text(two_servers: Any, start_router: Start) -> None:
    (_, url), _ = two_servers
    async with start_router(url) as client:
        async with client.complete() as response:
            assert response.status == 200
        async with client.call("GET", "/metrics") as response:
            text = await response.text()
    assert 'toppings_router_ended_total{outcome="answered"} 1.0' in text
    assert 'toppings_router_instance_up{server="s0"} 1.0' in text


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v1/completions", 405, "GET is not allowed on this route, only "),
        ("GET", "/nowhere", 404, "no route is at /nowhere"),
    ],
)
async def test_unknown_route_and_wrong_method(
    two_servers: Any, start_router: Start, method: str, path: str, status: int, message: str
) -> None:
    (_, url), _ = two_servers
    async with start_router(url) as client, client.call(method, path) as response:
        assert response.status == status
        error = (await response.json())["error"]
        assert (error["message"].startswith(message), error["code"]) == (True, status)
