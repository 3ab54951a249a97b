"""Who may do what over HTTP: every route and every role, limits, and what tenants see of each other."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import APIRouter

from tests.server.conftest import Server
from tests.waiting import until
from toppings.dashboard.page import EVENTS
from toppings.request_ids import REQUEST_ID
from toppings.server.auth import KeyMiddleware
from toppings.server.errors import without_paths
from toppings.server.paths import AdapterRoots
from toppings.tenants.book import TENANT_HEADER
from toppings.tenants.keys import digest_of
from toppings.tenants.refusals import Refusal
from toppings.tenants.tenant import Tenant

FILE = """\
tenants:
  user: {use: ["shared-*"], see: ["shown-*"]}
  loader: {use: ["shared-*"], load: ["mine-*"], load_from: ["*"]}
  other: {load: ["secret-*"], load_from: ["*"], base_model: off}
  boss: {admin: on}
keys:
"""
KEYS = {"user": "key-u", "loader": "key-l", "other": "key-o", "boss": "key-b"}
ROLES = {"anonymous": None, "wrong": "wrong", **KEYS, "administrator": "the-one"}
ADAPTERS = ("shared-a", "shown-a", "mine-a", "secret-a")


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.yaml"
    entries = [
        f'- {{"id": "{name}", "tenant": "{name}", "sha256": "{digest_of(key.encode()).hex()}"}}\n'
        for name, key in KEYS.items()
    ]
    path.write_text(FILE + "".join(entries))
    return path


@pytest.fixture
def settings(tenants: Path) -> dict[str, object]:
    return {"tenants_file": str(tenants), "api_key": "the-one"}


@pytest.fixture
async def server(server: Server) -> Server:
    path = Path(server.state.config.server.adapters) / "adapter-00000"
    for name in ADAPTERS:
        server.registry.register(name, path)
    return server


def give(server: Server, tenant: str, **settings: Any) -> None:
    """Other settings for a tenant, as a changed file would; from now on no limit recovers."""
    now = server.state.book.now()
    server.state.book.clock = lambda: now
    account = server.state.book.accounts[tenant]
    account.tenant = replace(account.tenant, **settings)


def as_role(role: str) -> dict[str, str]:
    key = ROLES[role]
    return {REQUEST_ID: "r"} if key is None else {REQUEST_ID: "r", "Authorization": f"Bearer {key}"}


async def ask(server: Server, role: str, method: str, path: str, body: object = None) -> httpx.Response:
    return await server.http.request(method, path, json=body, headers=as_role(role))


# --- every route, every role ---

OPEN, ANY, LOADING, ADMIN = "open", "any key", "who may load it", "administrators"
OWN = {"lora_name": "mine-x", "lora_path": "nowhere"}
ACCESS: dict[str, tuple[str, dict[str, Any] | None]] = {
    **dict.fromkeys(
        (
            *(f"GET /{path}" for path in ("health", "healthz", "ping", "ready")),
            *("POST /ping", "GET /docs", "GET /docs/{asset}", "GET /openapi.json"),
            *("GET /dashboard", "GET /dashboard/static/{asset}"),
        ),
        (OPEN, None),
    ),
    **dict.fromkeys(
        (
            *("POST /v1/completions", "POST /v1/chat/completions", "POST /v1/responses"),
            *("POST /v1/messages", "POST /v1/messages/count_tokens", "POST /v1/embeddings"),
            *("POST /v1/score", "POST /score", "POST /generate", "POST /generate_stream"),
            *("POST /tokenize", "POST /detokenize"),
        ),
        (ANY, {}),
    ),
    **dict.fromkeys(
        (*("GET /v1/models", "GET /v1/models/{name:path}", "GET /adapters", "GET /version"),),
        (ANY, None),
    ),
    "POST /adapters": (LOADING, {"name": "mine-x", "src": "nowhere"}),
    "DELETE /adapters/{name:path}": (LOADING, None),
    **dict.fromkeys(("POST /v1/load_lora_adapter", "POST /load_lora_adapter"), (LOADING, OWN)),
    **dict.fromkeys(
        ("POST /v1/unload_lora_adapter", "POST /unload_lora_adapter"), (LOADING, {"lora_name": "mine-x"})
    ),
    **dict.fromkeys(("POST /adapters/{name:path}/pin", "DELETE /adapters/{name:path}/pin"), (ADMIN, None)),
    "POST /adapters/{name:path}/prefetch": (ADMIN, None),
    **dict.fromkeys(("GET /stats", "GET /metrics", "GET /cold_starts"), (ADMIN, None)),
    **dict.fromkeys((f"GET /dashboard/{path}" for path in ("events", "data", "adapters")), (ADMIN, None)),
}
MAY = {
    OPEN: set(ROLES),
    ANY: {*KEYS, "administrator"},
    LOADING: {"loader", "boss", "administrator"},
    ADMIN: {"boss", "administrator"},
}


def test_the_table_has_every_route(server: Server) -> None:
    routes = {
        f"{method} {route.path}"
        for route in server.app.state.routes
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert routes == ACCESS.keys()


@pytest.mark.parametrize("role", ROLES)
async def test_every_route_answers_whom_it_should(server: Server, role: str) -> None:
    told = {}
    for operation, (_, body) in ACCESS.items():
        method, _, path = operation.partition(" ")
        path = path.replace("{name:path}", "mine-x").replace("{asset}", "favicon.png")
        method = "HEAD" if path == EVENTS else method  # the answer to a GET has no end
        reply = await ask(server, role, method, path, body)
        told[operation] = reply.status_code if reply.status_code in (401, 403) else "let in"
    refused = 401 if ROLES[role] in (None, "wrong") else 403
    assert told == {name: "let in" if role in MAY[who] else refused for name, (who, _) in ACCESS.items()}


async def test_nobody_is_an_administrator_because_nobody_looked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that has come to a route without being asked who sends it, as a route that were mounted past
    the middleware would be."""
    monkeypatch.setattr(KeyMiddleware, "_admit", lambda self, scope: None)
    for operation, (who, body) in ACCESS.items():
        method, _, path = operation.partition(" ")
        path = path.replace("{name:path}", "mine-x").replace("{asset}", "favicon.png")
        method = "HEAD" if path == EVENTS else method
        reply = await ask(server, "administrator", method, path, body)
        assert (reply.status_code == 401) == (who != OPEN), operation
    with pytest.raises(Refusal, match="API key"):
        _ = server.state.account  # outside of requests, too


@pytest.mark.parametrize("role", ["anonymous", "wrong", "user"])
async def test_no_spelling_of_a_path_opens_it(server: Server, role: str) -> None:
    for path in ("stats", "metrics", "cold_starts", "dashboard/data", "dashboard/adapters"):
        for spelling in (
            *(f"/{path}/", f"//{path}", f"/./{path}", f"/health/../{path}", f"/docs/..%2f{path}"),
            *(f"/dashboard/static/..%2f..%2f{path}", f"/%2e/{path}", f"/{path}%20", f"/{path.upper()}"),
            *(f"/{path};a=b", f"/health%2f..%2f{path}", f"/{path}%3f"),
        ):
            reply = await server.http.send(
                httpx.Request("GET", f"http://test{spelling}", headers=as_role(role)), follow_redirects=True
            )
            assert reply.status_code in (401, 403, 404), spelling


async def test_a_route_that_is_added_later_is_for_administrators(server: Server) -> None:
    """As those are that Ray's front has beside the server's."""
    more = APIRouter()
    more.add_api_route("/replicas", lambda: {"replicas": []})
    server.app.include_router(more)
    replies = [(await ask(server, role, "GET", "/replicas")).status_code for role in ROLES]
    assert replies == [401, 401, 403, 403, 403, 200, 200]


@pytest.mark.parametrize("operation", [name for name, (who, _) in ACCESS.items() if who == LOADING])
async def test_whoever_loads_its_own_may_not_touch_others(server: Server, operation: str) -> None:
    """Whether they are there or not: the answers are the same but for the name."""
    method, _, path = operation.partition(" ")
    body = ACCESS[operation][1]
    texts = []
    for name in ("secret-a", "secret-z", "base"):
        fields = {} if body is None else dict.fromkeys(body.keys() & {"name", "lora_name"}, name)
        named = None if body is None else {**body, **fields}
        reply = await ask(server, "loader", method, path.replace("{name:path}", name), named)
        assert reply.status_code == 403
        texts.append(reply.text.replace(name, "NAME"))
    assert len(set(texts)) == 1
    assert server.registry.find_named("secret-a") is not None


MODEL_BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/embeddings": {"input": "x"},
    "/v1/score": {"text_1": "x", "text_2": "y"},
    "/score": {"text_1": "x", "text_2": "y"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [70]},
    "/generate": {"inputs": "x"},
    "/generate_stream": {"inputs": "x"},
}


def with_model(path: str, model: str) -> dict[str, Any]:
    body = MODEL_BODIES[path]
    if not path.startswith("/generate"):
        return {**body, "model": model}
    return {**body, "parameters": {"max_new_tokens": 1, **({} if model == "base" else {"adapter_id": model})}}


@pytest.mark.parametrize("path", MODEL_BODIES)
async def test_models_are_used_by_whom_the_file_says(server: Server, path: str) -> None:
    """Seen but not used: 403. Not seen: as if there were none."""

    async def status(role: str, model: str) -> int:
        reply = await ask(server, role, "POST", path, with_model(path, model))
        return reply.status_code

    gone = 424 if path.startswith("/generate") else 404
    assert [await status("user", model) for model in ("base", *ADAPTERS)] == [200, 200, 403, gone, gone]
    assert [await status("loader", model) for model in ("base", *ADAPTERS)] == [200, 200, gone, 200, gone]
    assert await status("user", "shown-nothing") == gone  # which it would see, if there were such a one
    assert [await status("other", model) for model in ("base", *ADAPTERS)] == [gone, gone, gone, gone, 200]
    assert [await status("boss", model) for model in ("base", *ADAPTERS)] == [200] * 5
    hidden, unknown = [
        (await ask(server, "user", "POST", path, with_model(path, name))).text.replace(name, "NAME")
        for name in ("secret-a", "secret-z")
    ]
    assert hidden == unknown
    assert not any(name in hidden for name in ("adapters,", "secret"))


async def test_numbers_and_paths_lead_to_no_adapter_that_is_not_seen(server: Server) -> None:
    record = server.registry.get("secret-a")
    for field, hidden, unknown in (
        ("lora_id", record.adapter_id, 999),
        ("lora_dir", record.path, f"{record.path}-not"),
    ):
        told = []
        for value in (hidden, unknown):
            body = {"inputs": "x", "parameters": {"max_new_tokens": 1}, field: value}
            reply = await ask(server, "user", "POST", "/generate", body)
            told.append((reply.status_code, reply.text.replace(str(value), "IT")))
        assert told[0] == told[1]
        assert told[0][0] == 404
    body = {"inputs": "x", "parameters": {"max_new_tokens": 1}, "lora_id": record.adapter_id}
    assert (await ask(server, "other", "POST", "/generate", body)).status_code == 200


async def test_lists_show_what_a_tenant_may_see(server: Server) -> None:
    async def seen(role: str) -> list[set[str]]:
        models = (await ask(server, role, "GET", "/v1/models")).json()["data"]
        adapters = (await ask(server, role, "GET", "/adapters")).json()["adapters"]
        return [{each["id"] for each in models}, {each["name"] for each in adapters}]

    for _ in range(2):  # made, and remembered
        assert await seen("user") == [{"base", "shared-a", "shown-a"}, {"shared-a", "shown-a"}]
        assert await seen("loader") == [{"base", "shared-a", "mine-a"}, {"shared-a", "mine-a"}]
        assert await seen("other") == [{"secret-a"}] * 2
        assert await seen("administrator") == [{"base", *ADAPTERS}, set(ADAPTERS)]
    server.registry.remove("shared-a")
    assert await seen("user") == [{"base", "shown-a"}, {"shown-a"}]
    assert (await ask(server, "user", "GET", "/v1/models/shown-a")).status_code == 200
    hidden, unknown = [
        (await ask(server, "user", "GET", f"/v1/models/{name}")) for name in ("mine-a", "mine-z")
    ]
    assert hidden.status_code == unknown.status_code == 404
    assert hidden.text.replace("mine-a", "") == unknown.text.replace("mine-z", "")
    sglang = await ask(server, "loader", "POST", "/unload_lora_adapter", {"lora_name": "mine-a"})
    assert sglang.json() == {"success": True, "error_message": "", "loaded_adapters": {}}


async def test_only_administrators_are_told_how_much_others_use_an_adapter(server: Server) -> None:
    use = {"hits", "running", "waiting"}
    for role, told in (("user", set()), ("loader", set()), ("boss", use), ("administrator", use)):
        rows = (await ask(server, role, "GET", "/adapters")).json()["adapters"]
        assert rows
        for row in rows:
            assert row.keys() & use == told
            assert row["state"] == "disk"
        schema = server.app.openapi()["components"]["schemas"]["AdapterRow"]
        assert set(schema["required"]) <= rows[0].keys() <= set(schema["properties"])


async def test_who_may_not_is_told_the_path_that_was_asked_for(server: Server) -> None:
    reply = await ask(server, "user", "POST", "/adapters/shared-a/pin")
    assert reply.status_code == 403
    assert "POST /adapters/shared-a/pin is for administrators" in reply.text


SECRET = "/srv/toppings/state/packed/7.pack"


@pytest.mark.parametrize("role", ["user", "loader"])
async def test_no_answer_tells_a_tenant_where_the_servers_files_are(
    server: Server, role: str, tmp_path: Path
) -> None:
    """Neither one that is good, nor one that says what is wrong with an adapter, a file or the engine."""
    adapters, roots = Path(server.state.config.server.adapters), tmp_path / "roots"
    shutil.copytree(adapters / "adapter-00000", roots / "good")
    broken = roots / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    server.app.state.admin.roots = AdapterRoots([roots, adapters])
    hidden = [str(tmp_path), str(adapters), str(server.registry.state_dir), str(server.state.model_path)]
    hidden.append("srv/toppings")
    told: dict[str, str] = {}

    async def note(method: str, path: str, body: object = None) -> str:
        reply = await ask(server, role, method, path, body)
        told[f"{method} {path} {body} {len(told)}"] = f"{reply.status_code} {reply.headers} {reply.text}"
        return reply.text

    for operation, (_, body) in ACCESS.items():
        method, _, path = operation.partition(" ")
        path = path.replace("{name:path}", "shared-a").replace("{asset}", "favicon.png")
        await note("HEAD" if path == EVENTS else method, path, body)
    for src in ("good", "broken", "nowhere", "../x", "\0", "hub:a/b", "s3://a/b"):
        await note("POST", "/adapters", {"name": "mine-x", "src": src})
        for path in ("/v1/load_lora_adapter", "/load_lora_adapter"):
            await note("POST", path, {"lora_name": "mine-y", "lora_path": src})
    for error in (f"cannot open packed adapter {SECRET}", f"[Errno 2] No such file: '{SECRET}'"):
        server.engine.error = error
        for path in MODEL_BODIES:
            for stream in ({}, {"stream": True}) if path.startswith("/v1") else ({},):
                await note("POST", path, {**with_model(path, "shared-a"), **stream})
    assert any("cannot open packed adapter 7.pack" in text for text in told.values())
    server.engine.error, server.engine.down_reason = None, f"cannot read {SECRET}"
    server.engine.died.set()
    for path in ("/health", "/ready"):
        assert "cannot read 7.pack" in await note("GET", path)
    for path in MODEL_BODIES:
        await note("POST", path, with_model(path, "shared-a"))
    for asked, answer in told.items():
        assert not any(place in answer for place in hidden), (asked, answer)


async def test_an_administrator_is_told_where_they_are(server: Server) -> None:
    record, model = server.registry.get("shared-a"), server.state.model_path
    cards = (await ask(server, "boss", "GET", "/v1/models")).json()["data"]
    assert {card["root"] for card in cards} == {str(model), str(record.path)}
    assert {card["root"] for card in (await ask(server, "user", "GET", "/v1/models")).json()["data"]} == {
        *("base", "shared-a", "shown-a")
    }
    rows = (await ask(server, "boss", "GET", "/adapters")).json()["adapters"]
    assert {row["path"] for row in rows} == {str(record.path)}
    server.engine.error = f"cannot open {SECRET}"
    body = {"model": "shared-a", "prompt": "x"}
    assert SECRET in (await ask(server, "boss", "POST", "/v1/completions", body)).text
    nowhere = await ask(server, "boss", "POST", "/adapters", {"name": "mine-x", "src": "nowhere"})
    assert str(Path(server.state.config.server.adapters)) in nowhere.text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cannot open /state/packed/7.pack: [Errno 2]", "cannot open 7.pack: [Errno 2]"),
        ("No such file: '/a/b c'", "No such file: 'b c'"),
        ("at /state/ or ~/.cache/x", "at state or x"),
        ("s3://bucket/loras/x, hub:org/name, dir:/a/b", "s3://bucket/loras/x, hub:org/name, dir:b"),
        ("3 tokens/s, and/or q/k/v / 2", "3 tokens/s, and/or q/k/v / 2"),
    ],
)
def test_of_a_path_its_last_part_is_left(text: str, told: str) -> None:
    assert without_paths(text) == told


# --- loading ---


async def test_a_tenant_loads_its_own_within_its_bytes_and_from_its_places(server: Server) -> None:
    directory = Path(server.state.config.server.adapters)
    num_bytes = server.registry.get("mine-a").num_bytes
    give(server, "loader", adapter_bytes=2 * num_bytes, load_from=(f"{directory}/adapter-00000",))

    async def load(name: str, path: str = "adapter-00000", **more: object) -> httpx.Response:
        body = {"lora_name": name, "lora_path": path, **more}
        return await ask(server, "loader", "POST", "/v1/load_lora_adapter", body)

    assert (await load("mine-b")).status_code == 200
    third = await load("mine-c")
    assert (third.status_code, "and 0 are left for it" in third.text) == (400, True)
    assert (await load("mine-b", load_inplace=True)).status_code == 200
    assert (await ask(server, "loader", "DELETE", "/adapters/mine-a")).status_code == 200
    elsewhere = await load("mine-c", "adapter-00002")
    assert (elsewhere.status_code, "may not load adapters from" in elsewhere.text) == (403, True)
    assert (await load("mine-c")).status_code == 200
    pinned = {"lora_name": "mine-d", "lora_path": "adapter-00000", "pinned": True}
    assert (await ask(server, "loader", "POST", "/load_lora_adapter", pinned)).status_code == 403


# --- limits ---


async def test_openais_client_sees_its_limits_and_its_errors(server: Server, url: str) -> None:
    give(server, "user", requests_per_minute=2, tokens_per_minute=1000)

    def client(key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)

    async with client("key-u") as user, client("wrong") as wrong:
        raw = await user.completions.with_raw_response.create(model="base", prompt=[70, 71, 72], max_tokens=5)
        assert raw.headers["x-ratelimit-limit-requests"] == "2"
        assert raw.headers["x-ratelimit-remaining-requests"] == "1"
        assert raw.headers["x-ratelimit-reset-requests"] == "30s"
        assert int(raw.headers["x-ratelimit-remaining-tokens"]) == 1000 - 3 - 5
        with pytest.raises(openai.PermissionDeniedError) as denied:
            await user.completions.create(model="shown-a", prompt="x")
        with pytest.raises(openai.RateLimitError) as limited:
            await user.completions.create(model="base", prompt="x")
        with pytest.raises(openai.AuthenticationError) as unknown:
            await wrong.models.list()
        assert await user.models.list()  # what costs nothing is not counted
    assert (denied.value.code, denied.value.type) == ("model_not_found", "invalid_request_error")
    assert denied.value.body["message"] == "Tenant `user` does not have access to model `shown-a`"  # type: ignore[index]
    assert (limited.value.code, limited.value.type) == ("rate_limit_exceeded", "requests")
    assert limited.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert limited.value.response.headers["retry-after"] == "30"
    assert limited.value.response.headers["retry-after-ms"] == "30000"
    assert (unknown.value.code, unknown.value.type) == ("invalid_api_key", "invalid_request_error")


@pytest.mark.parametrize("is_stream", [False, True])
async def test_tokens_of_prompts_and_answers_are_counted(server: Server, is_stream: bool) -> None:
    give(server, "user", tokens_per_minute=100)
    body = {"model": "base", "prompt": [70] * 20, "max_tokens": 15, "n": 2, "stream": is_stream}
    await ask(server, "user", "POST", "/v1/completions", body)
    left = server.state.book.accounts["user"].headers()["x-ratelimit-remaining-tokens"]
    assert int(left) == 100 - 20 - 2 * 15
    large = await ask(server, "user", "POST", "/v1/completions", {**body, "prompt": [70] * 101, "n": 1})
    assert (large.status_code, "Request too large" in large.text) == (429, True)
    assert large.json()["error"]["type"] == "tokens"
    metrics = (await ask(server, "boss", "GET", "/metrics")).text
    for line in (
        'requests_total{outcome="rejected"} 1.0',
        'rejected_total{reason="tenant"} 1.0',
        'rejected_total{reason="queue"} 0.0',
        'tenant_requests_total{tenant="user"} 2.0',
        'tenant_rejected_total{tenant="user"} 1.0',
        'tenant_tokens_total{kind="prompt",tenant="user"} 40.0',
        'tenant_tokens_total{kind="generation",tenant="user"} 30.0',
    ):
        assert f"toppings:{line}" in metrics


async def test_what_an_answer_may_have_is_reserved_where_the_request_says_it(server: Server) -> None:
    give(server, "user", tokens_per_minute=60)
    body = {"model": "base", "prompt": [70] * 20, "max_tokens": 41}
    large = await ask(server, "user", "POST", "/v1/completions", body)
    assert (large.status_code, "Limit 60, Requested 61" in large.text) == (429, True)
    chat = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
    told = await ask(server, "user", "POST", "/v1/chat/completions", {**chat, "max_tokens": 60})
    assert told.status_code == 429
    assert (await ask(server, "user", "POST", "/v1/chat/completions", chat)).status_code == 200


async def test_a_refused_request_is_not_read_and_told_in_its_dialect(server: Server) -> None:
    give(server, "user", requests_per_minute=1)
    assert (await ask(server, "user", "POST", "/tokenize", {"prompt": "x"})).status_code == 200
    reply = await server.http.post("/v1/messages", content=b"{", headers=as_role("user"))
    assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
    assert reply.headers["retry-after"]
    metrics = (await ask(server, "boss", "GET", "/metrics")).text
    assert 'toppings:requests_total{outcome="rejected"} 1.0' in metrics


async def test_what_a_tenant_may_not_do_uses_up_no_limit(server: Server) -> None:
    give(server, "user", requests_per_minute=1)
    for path in ("/adapters/shared-a/pin", "/adapters/shared-a/pin", "/nowhere"):
        assert (await ask(server, "user", "POST", path)).status_code in (403, 404)
    assert (await ask(server, "user", "POST", "/tokenize", {"prompt": "x"})).status_code == 200
    assert (await ask(server, "user", "POST", "/tokenize", {"prompt": "x"})).status_code == 429


async def test_what_is_refused_for_what_it_asks_uses_up_one(server: Server) -> None:
    give(server, "user", requests_per_minute=2)
    for model, status in (("shown-a", 403), ("nobody", 404), ("shared-a", 429)):
        body = {"prompt": "x", "model": model}
        assert (await ask(server, "user", "POST", "/v1/completions", body)).status_code == status


async def test_one_tenants_crowd_leaves_room_for_others(server: Server) -> None:
    """Half of the places in the queue, and as many requests at once as it may have."""
    give(server, "user", max_requests=2)
    server.engine.gate.clear()
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    crowd = [asyncio.create_task(ask(server, "user", "POST", "/v1/completions", body)) for _ in range(5)]
    done, waiting = await asyncio.wait(crowd, return_when=asyncio.FIRST_COMPLETED)
    while len(done) < 3:
        more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        done |= more
    assert [task.result().status_code for task in done] == [429] * 3
    wide = {**body, "model": "base", "n": 65, "prompt": ["x", "y"]}
    too_wide = await ask(server, "loader", "POST", "/v1/completions", wide)
    assert (too_wide.status_code, "Limit 128" in too_wide.text) == (429, True)
    server.engine.gate.set()
    assert [reply.status_code for reply in await asyncio.gather(*waiting)] == [200, 200]
    assert (await ask(server, "user", "POST", "/v1/completions", body)).status_code == 200


async def test_a_queue_that_others_have_filled_takes_who_has_nothing_in_it(server: Server) -> None:
    config = server.state.config
    server.state.config = replace(config, server=replace(config.server, max_queue=8))
    server.engine.gate.clear()
    body = {"model": "shared-a", "prompt": "x", "max_tokens": 1}
    flood = [
        asyncio.create_task(ask(server, role, "POST", "/v1/completions", body))
        for role in ("user", "loader")
        for _ in range(4)
    ]
    await until(lambda: server.state.num_waiting == 8)
    own = {**body, "model": "secret-a"}
    newcomer = asyncio.create_task(ask(server, "other", "POST", "/v1/completions", own))
    await until(lambda: server.state.num_waiting == 9)
    again = await ask(server, "other", "POST", "/v1/completions", own)
    assert (again.status_code, "9 requests are waiting already" in again.text) == (429, True)
    server.engine.gate.set()
    assert [reply.status_code for reply in await asyncio.gather(*flood, newcomer)] == [200] * 9


async def test_no_tenant_goes_before_all_others_unless_it_may(server: Server) -> None:
    engine = replace(server.state.config.engine, scheduling_policy="priority")
    server.state.config = replace(server.state.config, engine=engine)

    async def status(role: str, priority: int) -> int:
        body = {"model": "shared-a", "prompt": "x", "max_tokens": 1, "priority": priority}
        return (await ask(server, role, "POST", "/v1/completions", body)).status_code

    assert [await status("user", priority) for priority in (-1, 0, 5)] == [403, 200, 200]
    give(server, "user", min_priority=-3)
    assert [await status("user", priority) for priority in (-4, -3)] == [403, 200]
    assert await status("boss", -7) == 200


# --- what the engine and fronts are told ---


async def test_the_engine_is_told_who_asks_and_keeps_their_prompts_apart(server: Server) -> None:
    give(server, "user", weight=2.5)
    give(server, "loader", share_prefixes="on")
    body = {"model": "base", "prompt": "x", "max_tokens": 1, "cache_salt": "s"}
    for role in ("user", "loader", "administrator"):
        await ask(server, role, "POST", "/v1/completions", body)
    told = [(call.standing.tenant, call.standing.weight) for call in server.engine.calls]
    assert told == [("user", 2.5), ("loader", 1.0), ("", 1.0)]
    salts = [call.cache_salt for call in server.engine.calls]
    assert salts[1:] == ["s", "s"]
    assert salts[0] not in (None, "s")
    bad = await ask(server, "user", "POST", "/v1/completions", {**body, "cache_salt": ""})
    assert bad.status_code == 400


async def test_a_front_speaks_for_its_tenants(server: Server) -> None:
    tenant = Tenant(name="afar", use=("shared-*",), weight=3.0)
    headers = {**as_role("administrator"), TENANT_HEADER: tenant.to_header()}

    async def status(model: str, **more: str) -> int:
        body = {"model": model, "prompt": "x", "max_tokens": 1}
        reply = await server.http.post("/v1/completions", json=body, headers={**headers, **more})
        return reply.status_code

    assert [await status(model) for model in ("base", "shared-a", "secret-a")] == [200, 200, 404]
    assert {(call.standing.tenant, call.standing.weight) for call in server.engine.calls} == {("afar", 3.0)}
    assert await status("base", **as_role("user")) == 403
    assert (await server.http.get("/stats", headers=headers)).status_code == 403
