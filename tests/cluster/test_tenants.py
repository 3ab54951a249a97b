"""Tenants at the router: keys, roles and limits are held there once, and servers are told who asks."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cluster.conftest import Client, Start, records_in
from tests.cluster.fakes import FakeServer
from tests.waiting import until
from toppings.cluster.report import LeftEntry
from toppings.cluster.router.app import closing_place
from toppings.cluster.router.calls import Call, parse_call
from toppings.cluster.router.flight import Flight
from toppings.cluster.router.stream_tokens import StreamTokens
from toppings.cluster.router.upstream import Kind
from toppings.cluster.snapshot import RequestSnapshot
from toppings.command import app
from toppings.dashboard.page import EVENTS
from toppings.tenants.book import TENANT_HEADER
from toppings.tenants.keys import add_key, digest_of
from toppings.tenants.tenant import Tenant

FILE = """\
tenants:
  user: {use: ["small"], see: ["large"], weight: 2}
  loader: {load: ["mine-*"], load_from: ["/mine/*"], base_model: off}
  limited: {use: ["*"], requests_per_minute: 3, tokens_per_minute: 100}
  boss: {admin: on}
keys:
"""
KEYS = {"user": "key-u", "loader": "key-l", "limited": "key-m", "boss": "key-b"}
ROLES = {"anonymous": None, "wrong": "wrong", **KEYS, "administrator": "the-one"}


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.yaml"
    entries = [
        f'- {{"id": "{name}", "tenant": "{name}", "sha256": "{digest_of(key.encode()).hex()}"}}\n'
        for name, key in KEYS.items()
    ]
    path.write_text(FILE + "".join(entries))
    return path


class Fleet:
    """A router with tenants over a Toppings server and one of vLLM."""

    def __init__(self, client: Client, servers: list[FakeServer], logs: Path | None = None) -> None:
        self.client, self.servers, self.logs = client, servers, logs

    async def records(self, name: str, num: int) -> list[dict[str, Any]]:
        """The lines of `<name>.jsonl`, once there are so many."""
        assert self.logs is not None
        return await records_in(self.logs / f"{name}.jsonl", num)

    async def ask(
        self, role: str, method: str, path: str, body: object = None, **headers: str
    ) -> tuple[int, str, dict[str, str]]:
        key = ROLES[role]
        given = {} if key is None else {"Authorization": f"Bearer {key}"}
        async with self.client.call(method, path, body, headers={**given, **headers}) as reply:
            return reply.status, await reply.text(), {k.lower(): v for k, v in reply.headers.items()}

    async def status(self, role: str, path: str = "/v1/completions", **body: Any) -> int:
        told = {"prompt": "hello", "max_tokens": 4, **body}
        return (await self.ask(role, "POST", path, told))[0]


@pytest.fixture
async def fleet(tenants: Path, two_servers: Any, start_router: Start, tmp_path: Path) -> AsyncIterator[Fleet]:
    (first, url), (second, other) = two_servers
    settings = {"api_key": "the-one", "upstream_api_key": "the-servers", "tenants_file": str(tenants)}
    async with start_router(url, other, records=tmp_path / "logs", **settings) as client:
        yield Fleet(client, [first, second], tmp_path / "logs")


OPEN, ANY, LOADING, ADMIN = "open", "any key", "who may load it", "administrators"
TENANT_POSTS = (
    *("completions", "chat/completions", "responses", "messages", "messages/count_tokens", "embeddings"),
    "score",
)
ACCESS = {
    **dict.fromkeys((f"GET /{path}" for path in ("health", "healthz", "ready", "ping")), OPEN),
    "POST /ping": OPEN,
    **dict.fromkeys((f"POST /v1/{path}" for path in TENANT_POSTS), ANY),
    **dict.fromkeys(
        (f"POST /{path}" for path in ("score", "generate", "generate_stream", "tokenize", "detokenize")), ANY
    ),
    **dict.fromkeys(("GET /v1/models", "GET /v1/models/{name:.+}", "GET /version"), ANY),
    **dict.fromkeys(("POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter"), LOADING),
    **dict.fromkeys(
        ("GET /instances", "POST /instances", "POST /instances/{id}/drain", "DELETE /instances/{id}"), ADMIN
    ),
    "GET /metrics": ADMIN,
    **dict.fromkeys(("GET /dashboard", "GET /dashboard/static/{asset}"), OPEN),
    **dict.fromkeys(("GET /dashboard/events", "GET /dashboard/data", "GET /dashboard/adapters"), ADMIN),
}
MAY = {
    OPEN: set(ROLES),
    ANY: {*KEYS, "administrator"},
    LOADING: {"loader", "boss", "administrator"},
    ADMIN: {"boss", "administrator"},
}


async def test_every_route_answers_whom_it_should(fleet: Fleet) -> None:
    routes = {f"{route.method} {route.path}" for route in fleet.client.router.routes()}
    assert {name for name in routes if not name.startswith("HEAD")} == ACCESS.keys()
    account = fleet.client.router.guard.book.accounts["limited"]
    account.tenant = Tenant(name="limited", use=("*",))
    for role, key in ROLES.items():
        told = {}
        for operation in ACCESS:
            method, _, path = operation.partition(" ")
            path = path.replace("{name:.+}", "mine-x").replace("{id}", "nobody").replace("{asset}", "app.js")
            method = "HEAD" if path == EVENTS else method  # the answer to a GET has no end
            body = {"lora_name": "mine-x", "lora_path": "/mine/missing"} if "lora_adapter" in path else []
            status, _, _ = await fleet.ask(role, method, path, body if method == "POST" else None)
            told[operation] = status if status in (401, 403) else "let in"
        refused = 401 if key in (None, "wrong") else 403
        assert told == {name: "let in" if role in MAY[who] else refused for name, who in ACCESS.items()}, role


@pytest.mark.parametrize("role", ["anonymous", "wrong", "user"])
async def test_no_spelling_of_a_path_opens_it(fleet: Fleet, role: str) -> None:
    for path in ("instances", "metrics", "dashboard/data", "dashboard/adapters"):
        for spelling in (
            *(f"/{path}/", f"//{path}", f"/docs/..%2f{path}", f"/dashboard/static/..%2f..%2f{path}"),
            *(f"/{path}%20", f"/{path.upper()}", f"/{path};a=b", f"/health%2f..%2f{path}", f"/%2e/{path}"),
        ):
            status, _, _ = await fleet.ask(role, "GET", spelling)
            assert status in (401, 403, 404), spelling


async def test_models_are_used_and_seen_by_whom_the_file_says(fleet: Fleet) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        told = [await fleet.status("user", path, model=model) for model in ("base", "small", "large", "none")]
        assert told == [200, 200, 403, 404]
    told = [await fleet.status("loader", model=model) for model in ("base", "small", "mine-x", "none")]
    assert told == [404] * 4
    assert await fleet.status("loader") == 404
    _, hidden, _ = await fleet.ask("loader", "POST", "/v1/completions", {"model": "small", "prompt": "x"})
    _, unknown, _ = await fleet.ask("loader", "POST", "/v1/completions", {"model": "nobod", "prompt": "x"})
    assert hidden.replace("small", "") == unknown.replace("nobod", "")
    listed = json.loads((await fleet.ask("user", "GET", "/v1/models"))[1])["data"]
    assert {card["id"] for card in listed} == {"base", "small", "large"}
    assert json.loads((await fleet.ask("loader", "GET", "/v1/models"))[1])["data"] == []
    assert (await fleet.ask("loader", "GET", "/v1/models/small"))[0] == 404
    assert (await fleet.ask("user", "GET", "/v1/models/large"))[0] == 200


async def test_top_shows_a_router_to_administrators_and_tells_others_why_not(fleet: Fleet) -> None:
    fleet.servers[0].behaviour.max_sent = fleet.servers[1].behaviour.max_sent = 0
    asked = asyncio.create_task(fleet.status("user", model="small"))
    await until(lambda: any(server.seen for server in fleet.servers))
    fleet.client.router.dashboard.feed._read_at = float("-inf")
    for role in ("boss", "administrator"):
        command = ["top", fleet.client.url, "--once", "--api-key", ROLES[role] or ""]
        result = await asyncio.to_thread(CliRunner().invoke, app, command)
        assert result.exit_code == 0
        assert "│ user │ small │" in " ".join(result.output.split())
    for role, told in (
        ("user", "403: You have insufficient permissions"),
        ("wrong", "401: Incorrect API key"),
    ):
        command = ["top", fleet.client.url, "--once", "--api-key", ROLES[role] or ""]
        result = await asyncio.to_thread(CliRunner().invoke, app, command)
        assert told in str(result.exception)
    for server in fleet.servers:
        server.behaviour.max_sent = None
    assert await asked == 200


async def test_tenants_are_not_told_where_servers_and_their_files_are(fleet: Fleet) -> None:
    async def told(role: str) -> str:
        answers = []
        for method, path, body in (
            ("GET", "/v1/models", None),
            ("GET", "/v1/models/small", None),
            ("POST", "/v1/completions", {"model": "small", "prompt": "x"}),
            ("POST", "/v1/completions", {"model": "small", "prompt": "x", "stream": True}),
            ("POST", "/v1/load_lora_adapter", {"lora_name": "mine-x", "lora_path": "/mine/x"}),
        ):
            _, text, headers = await fleet.ask(role, method, path, body)
            answers.append(f"{headers} {text}")
        return "".join(answers)

    secret = re.compile(r"\bs[01]\b|/models/|/adapters/")
    for mode in ("ok", "cut", "error"):
        for server in fleet.servers:
            server.behaviour.mode = mode
        texts = [await told(role) for role in ("administrator", "user", "loader")]
        assert {found[:4] for found in secret.findall(texts[0])} >= {"/mod", "/ada"}
        assert re.search(r"\bs[01]\b", texts[0]) is not None
        assert not any(secret.search(text) for text in texts[1:])


@pytest.mark.parametrize(
    "body",
    [
        {"model": "large", "stream": "yes"},
        {"model": "large" * 10_000},
        {"parameters": {"adapter_id": "large"}},
        {"parameters": {"adapter_id": "small"}, "lora_dir": "large"},
        {"parameters": {}, "lora_id": 2},
        {"parameters": {"merged_adapters": {"ids": ["small", "large"], "weights": [0.5, 0.5]}}},
    ],
)
async def test_no_odd_body_gets_a_model_that_is_not_the_tenants(fleet: Fleet, body: dict[str, Any]) -> None:
    path = "/v1/completions" if "model" in body else "/generate"
    status, text, _ = await fleet.ask("user", "POST", path, {"inputs": "x", "prompt": "x", **body})
    assert status in (400, 403, 404)
    assert len(text) < 1000
    assert [server.seen for server in fleet.servers] == [[], []]


async def test_servers_are_told_who_asks_and_nothing_of_keys(fleet: Fleet) -> None:
    for role in ("user", "administrator"):
        for _ in range(2):
            assert await fleet.status(role, model="small", priority=3) == 200
    bodies = [json.loads(raw) for server in fleet.servers for raw in server.raw_bodies]
    assert [body["priority"] for body in bodies] == [3] * 4
    toppings, vllm = (server.headers for server in fleet.servers)
    assert toppings
    assert {headers["authorization"] for headers in (*toppings, *vllm)} == {"Bearer the-servers"}
    told = {headers.get(TENANT_HEADER.lower(), "") for headers in toppings}
    assert told <= {"", Tenant(name="user", use=("small",), see=("large",), weight=2.0).to_header()}
    assert not any(TENANT_HEADER.lower() in headers for headers in vllm)
    spoof = {TENANT_HEADER: Tenant(name="user").to_header()}
    body = {"model": "small", "prompt": "x"}
    assert (await fleet.ask("limited", "POST", "/v1/completions", body, **spoof))[0] == 403
    assert (await fleet.ask("administrator", "POST", "/v1/completions", body, **spoof))[0] == 404


async def test_keys_that_the_router_asks_for_stay_with_it(
    tenants: Path, two_servers: Any, start_router: Start
) -> None:
    (first, url), _ = two_servers
    body = {"model": "small", "prompt": "x", "max_tokens": 1}
    for settings in ({"tenants_file": str(tenants)}, {}):
        async with start_router(url, api_key="the-one", **settings) as client:
            fleet = Fleet(client, [first])
            for role in ("user", "administrator") if settings else ("administrator",):
                key = ROLES[role] or ""
                assert (await fleet.ask(role, "POST", "/v1/completions", body))[0] == 200
                for name in ("X-Api-Key", "x-api-key"):
                    assert (await fleet.ask("anonymous", "POST", "/v1/completions", body, **{name: key}))[
                        0
                    ] == 200
    assert not any({"authorization", "x-api-key"} & headers.keys() for headers in first.headers)
    assert Tenant.from_header(first.headers[0][TENANT_HEADER.lower()]).name == "user"


async def test_a_router_without_keys_passes_on_the_clients_own(two_servers: Any, start_router: Start) -> None:
    (first, url), _ = two_servers
    async with start_router(url) as client:
        assert await Fleet(client, [first]).status("administrator", model="small") == 200
    assert first.headers[0]["authorization"] == "Bearer the-one"


async def test_limits_are_held_once_for_all_servers(fleet: Fleet) -> None:
    book = fleet.client.router.guard.book
    now = book.now()
    book.clock = lambda: now  # no limit recovers
    body = {"model": "small", "prompt": "x" * 38, "max_tokens": 50}  # 3 tokens by `usage`, and fifty
    status, _, headers = await fleet.ask("limited", "POST", "/v1/completions", body)
    assert status == 200
    assert headers["x-ratelimit-remaining-requests"] == "2"
    assert book.accounts["limited"].headers()["x-ratelimit-remaining-tokens"] == "47"
    rest = {
        **body,
        "max_tokens": 37,
        "stream": True,
    }  # ten are estimated of its prompt; it draws more than it says
    assert (await fleet.ask("limited", "POST", "/v1/completions", rest))[0] == 200
    status, text, headers = await fleet.ask("limited", "POST", "/v1/completions", body)
    assert (status, json.loads(text)["error"]["code"]) == (429, "rate_limit_exceeded")
    assert json.loads(text)["error"]["type"] == "tokens"
    assert int(headers["retry-after"]) >= 1
    assert headers["x-ratelimit-remaining-tokens"] == "0"
    status, text, _ = await fleet.ask("limited", "POST", "/v1/messages", {})
    assert (status, json.loads(text)["error"]["type"]) == (429, "rate_limit_error")


@pytest.mark.parametrize(
    ("path", "body", "num_reserved"),
    [
        ("/v1/completions", {}, 16),
        ("/v1/completions", {"max_tokens": 5, "n": 3}, 15),
        ("/v1/completions", {"max_tokens": 5, "n": 2, "best_of": 3}, 15),
        ("/v1/completions", {"max_tokens": 5, "prompt": 'one, ["text"]'}, 5),
        ("/v1/completions", {"max_tokens": 5, "prompt": [1, 2, 3]}, 5),
        ("/v1/completions", {"max_tokens": 5, "prompt": []}, 5),
        ("/v1/completions", {"max_tokens": 5, "prompt": ["a", "[b", "c"]}, 15),
        ("/v1/completions", {"max_tokens": 5, "n": 2, "prompt": [[1, 2], [3]]}, 20),
        ("/v1/completions", {"max_tokens": 1, "prompt": ['"', "\\", '\\"', 'n\n\\\\"', "", ","]}, 6),
        ("/v1/chat/completions", {}, 0),
        ("/v1/chat/completions", {"max_completion_tokens": 9}, 9),
        ("/v1/chat/completions", {"max_tokens": -1, "n": -1}, 0),
        ("/v1/responses", {"max_output_tokens": 7}, 7),
        ("/generate", {"parameters": {"max_new_tokens": 6}}, 6),
        ("/v1/embeddings", {}, 0),
        ("/tokenize", {}, 0),
    ],
)
def test_an_answer_reserves_what_its_request_says(path: str, body: dict[str, Any], num_reserved: int) -> None:
    assert parse_call(path, json.dumps(body).encode(), 4.0).reserved_tokens == num_reserved


def sse(*events: object) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


def test_tokens_of_a_stream_are_its_usages_and_its_events_until_then() -> None:
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    word = {"choices": [{"delta": {"content": 'data: data: \n"usage"'}}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 7}}
    stream = sse(role, word, word, usage) + b"data: [DONE]\n\n"
    for size in (1, 7, len(stream)):
        tokens = StreamTokens("/v1/chat/completions")
        assert sum(tokens.note(stream[i : i + size]) for i in range(0, len(stream), size)) == 2
        assert (tokens.prompt, tokens.answer) == (9, 7)
    tokens = StreamTokens("/v1/messages")
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 5, "output_tokens": 1}}}
    end = {"type": "message_delta", "usage": {"output_tokens": 8}}
    delta = b"event: content_block_delta\n" + sse({"delta": {"text": "event: content_block_delta"}})
    assert tokens.note(b"event: message_start\n" + sse(start) + delta + sse(end)) == 1
    assert (tokens.prompt, tokens.answer) == (5, 8)
    tokens = StreamTokens("/v1/responses")
    last = {"type": "response.completed", "response": {"usage": {"input_tokens": 4, "output_tokens": 6}}}
    assert tokens.note(b"event: response.output_text.delta\n" + sse({"delta": "x"}) + sse(last)) == 1
    assert (tokens.prompt, tokens.answer) == (4, 6)


async def test_a_whole_answer_that_nobody_waits_for_costs_tokens(fleet: Fleet) -> None:
    book = fleet.client.router.guard.book
    now = book.now()
    book.clock = lambda: now
    for server in fleet.servers:
        server.behaviour.mode = "hang"
    body = {"model": "small", "prompt": "x" * 38, "max_tokens": 50}
    asked = asyncio.create_task(fleet.ask("limited", "POST", "/v1/completions", body))
    await until(lambda: any(server.seen for server in fleet.servers))
    asked.cancel()
    account = book.accounts["limited"]
    await until(lambda: not account.num_open)
    assert 40 <= int(account.headers()["x-ratelimit-remaining-tokens"]) < 90


async def test_an_answer_that_nobody_waits_for_costs_what_its_server_had_drawn(fleet: Fleet) -> None:
    state, book, server = fleet.client.router.state, fleet.client.router.guard.book, fleet.servers[0]
    now = book.now()
    book.clock = lambda: now
    state.upstreams["s1"].is_draining = True
    state.refresh_open(state.upstreams["s1"])
    account = book.accounts["limited"]

    def left() -> int:
        return int(account.headers()["x-ratelimit-remaining-tokens"])

    async def leave() -> None:
        server.behaviour.mode, num_seen = "hang", len(server.headers)
        body = {"model": "small", "prompt": "x" * 38, "max_tokens": 50}
        request = fleet.ask("limited", "POST", "/v1/completions", body, **{"X-Request-Id": "mine"})
        asked = asyncio.create_task(request)
        await until(lambda: len(server.headers) > num_seen)
        asked.cancel()
        await until(lambda: not account.num_open)
        server.behaviour.mode = "ok"

    await leave()
    assert left() < 90
    server.extra_stats = {"left": [[1, "user", "mine", 3, 40], [2, "limited", "mine", 3, 7]]}
    await fleet.client.router.monitor.check(state.upstreams["s0"])
    assert left() == 90
    await leave()
    before = left()
    await fleet.client.router.monitor.check(state.upstreams["s0"])  # it tells of the first one again
    assert left() == before < 80
    server.extra_stats["left"].append([3, "limited", "mine", None, 0])
    await fleet.client.router.monitor.check(state.upstreams["s0"])
    assert left() == 80  # of its prompt ten were estimated


async def test_answers_that_were_left_by_one_id_are_each_settled(fleet: Fleet) -> None:
    state, book = fleet.client.router.state, fleet.client.router.guard.book
    now = book.now()
    book.clock = lambda: now
    account, flights = book.accounts["limited"], state.flights

    def leave() -> int:
        """What the tenant has left then."""
        call = Call("/v1/completions", b"", max_tokens=20)
        with closing_place(account, call) as place:
            request = RequestSnapshot("1", "small", 8, 1, 20.0)
            flights.leave(Flight(call, request, place, instance_id="s0", client_id="mine", has_begun=True))
        return left()

    def left() -> int:
        return int(account.headers()["x-ratelimit-remaining-tokens"])

    leave()
    before = leave()
    flights.note_left("s0", [LeftEntry(1, "limited", "mine", 1, 7), LeftEntry(2, "limited", "mine", 1, 9)])
    assert left() == 100 - 8 - 10 != before
    untold = leave()
    flights.forget("s0")  # one that is added anew may begin at 1 again, but tells nothing of who left the old
    flights.note_left("s0", [LeftEntry(1, "limited", "mine", 1, 19)])
    assert left() == untold


async def test_a_server_whose_stats_fail_at_first_is_a_toppings_one_all_the_same(
    tenants: Path, two_servers: Any, start_router: Start
) -> None:
    (server, url), _ = two_servers
    server.behaviour.stats_status = 503
    async with start_router(url, tenants_file=str(tenants)) as client:
        upstream = client.router.state.upstreams["s0"]
        assert upstream.is_alive
        assert upstream.kind is Kind.UNKNOWN
        server.behaviour.stats_status = 200
        await until(lambda: upstream.kind is Kind.TOPPINGS)
        assert await Fleet(client, [server]).status("user", model="small") == 200
        assert Tenant.from_header(server.headers[0][TENANT_HEADER.lower()]).name == "user"


@pytest.mark.parametrize("status", [404, 501])
async def test_a_server_without_stats_is_no_toppings_one(
    status: int, two_servers: Any, start_router: Start
) -> None:
    (server, url), _ = two_servers
    server.behaviour.stats_status = status
    async with start_router(url) as client:
        assert client.router.state.upstreams["s0"].kind is Kind.OPENAI


async def test_a_tenant_loads_its_own_on_all_servers(fleet: Fleet) -> None:
    @asynccontextmanager
    async def no_call() -> AsyncIterator[None]:
        before = [len(server.admin_calls) for server in fleet.servers]
        yield
        assert [len(server.admin_calls) for server in fleet.servers] == before

    async def change(what: str, name: str, path: str = "/mine/x") -> int:
        body = {"lora_name": name, **({"lora_path": path} if what == "load" else {})}
        return (await fleet.ask("loader", "POST", f"/v1/{what}_lora_adapter", body))[0]

    async with no_call():
        assert await change("load", "theirs") == 403
        assert await change("load", "mine-x", "/mine/../theirs/x") == 403
        assert await change("unload", "small") == 403
    assert await change("load", "mine-x") == 200
    header = fleet.servers[0].headers[-1][TENANT_HEADER.lower()]
    assert Tenant.from_header(header).name == "loader"
    assert all("mine-x" in server.adapters for server in fleet.servers)
    assert await fleet.status("loader", model="mine-x") == 200
    assert await change("unload", "mine-x") == 200


async def test_a_changed_file_counts_without_a_restart(fleet: Fleet, tenants: Path) -> None:
    assert await fleet.status("user", model="large") == 403
    tenants.write_text(tenants.read_text().replace('use: ["small"]', 'use: ["small", "large"]'))
    fleet.client.router.guard.book.reload()
    assert await fleet.status("user", model="large") == 200


async def test_changes_that_were_denied_are_told_and_who_was_told_no_is_counted(fleet: Fleet) -> None:
    body = {"lora_name": "mine-x", "lora_path": "/mine/x"}
    named = {"X-Request-Id": "mine"}
    for role in ("anonymous", "wrong", "user"):
        await fleet.ask(role, "POST", "/v1/load_lora_adapter", body, **named)
    await fleet.ask("user", "DELETE", "/instances/s0")
    await fleet.ask("loader", "POST", "/v1/unload_lora_adapter", {"lora_name": "small"})
    assert await fleet.status("wrong") == 401  # no change
    told = [
        (line["action"], line["outcome"], line["status"], line["tenant"])
        for line in await fleet.records("audit", 5)
    ]
    assert told == [
        ("POST /v1/load_lora_adapter", "denied", 401, None),
        ("POST /v1/load_lora_adapter", "denied", 401, None),
        ("POST /v1/load_lora_adapter", "denied", 403, "user"),
        ("DELETE /instances/s0", "denied", 403, "user"),
        ("POST /v1/unload_lora_adapter", "denied", 403, "loader"),
    ]
    lines = await fleet.records("audit", 5)
    assert (lines[0]["request_id"], lines[0]["client"]) == ("mine", "127.0.0.1")
    assert "mine-x" in lines[2]["error"]
    assert "DELETE /instances/s0 is for administrators" in lines[3]["error"]
    assert [line["key"] for line in lines] == [None, None, "user", "user", "loader"]
    [request] = await fleet.records("requests", 1)
    assert (request["status"], request["tenant"], request["outcome"]) == (401, None, "refused")
    metrics = (await fleet.ask("administrator", "GET", "/metrics"))[1]
    assert 'toppings_router_denied_total{status="401"} 3.0' in metrics
    assert 'toppings_router_denied_total{status="403"} 3.0' in metrics
    assert 'toppings_router_refused_total{status="401"} 1.0' in metrics
    assert "wrong" not in "".join(map(str, [*lines, request]))


async def test_a_refused_request_has_its_model_and_an_expired_key_its_tenant(
    fleet: Fleet, tenants: Path
) -> None:
    key, book = add_key(tenants, "user", "2999-01-01"), fleet.client.router.guard.book
    book.reload()
    for model, status in (("large", 403), ("nobody", 404)):
        assert await fleet.status("user", model=model) == status
    book.wall_clock = lambda: datetime(2999, 1, 2, tzinfo=UTC).timestamp()
    headers = {"Authorization": f"Bearer {key.text}"}
    body = {"model": "small", "prompt": "x"}
    assert (await fleet.ask("anonymous", "POST", "/v1/completions", body, **headers))[0] == 401
    *refused, expired = await fleet.records("requests", 3)
    assert [(line["status"], line["model"]) for line in refused] == [(403, "large"), (404, "nobody")]
    assert (expired["status"], expired["tenant"], expired["key"]) == (401, "user", key.entry.id)


async def test_what_tenants_had_is_counted_and_logged_with_their_keys(fleet: Fleet) -> None:
    book = fleet.client.router.guard.book
    now = book.now()
    book.clock = lambda: now
    body = {"model": "small", "prompt": "x", "max_tokens": 5}
    for _ in range(4):
        await fleet.ask("limited", "POST", "/v1/completions", body)
    assert await fleet.status("user", stream=True, model="small") == 200
    *answered, rejected, streamed = await fleet.records("requests", 5)
    for line in answered:
        assert (line["tenant"], line["key"], line["outcome"]) == ("limited", "limited", "answered")
        assert (line["prompt_tokens"], line["completion_tokens"]) == (3, 5)
    assert (rejected["status"], rejected["outcome"], rejected["model"]) == (429, "rejected", "")
    assert "server" not in rejected
    assert (streamed["completion_tokens"], streamed["tenant"]) == (4, "user")
    metrics = (await fleet.ask("administrator", "GET", "/metrics"))[1]
    for told in (
        'rejected_total{reason="tenant"} 1.0',
        'tenant_requests_total{tenant="limited"} 4.0',
        'tenant_rejected_total{tenant="limited"} 1.0',
        'tenant_tokens_total{kind="prompt",tenant="limited"} 9.0',
        'tenant_tokens_total{kind="generation",tenant="limited"} 15.0',
        'refused_total{status="429"} 1.0',
    ):
        assert f"toppings_router_{told}" in metrics


async def test_keys_that_come_are_told(fleet: Fleet, tenants: Path) -> None:
    key = add_key(tenants, "user")
    fleet.client.router.guard.book.reload()
    [line] = await fleet.records("audit", 1)
    assert (line["action"], line["key"], line["of"]) == ("add key", key.entry.id, "user")
