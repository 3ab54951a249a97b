"""The router's request log and audit log, and the ids that requests go by on all of its ways."""

import asyncio
import logging
import threading
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import Client, Start, records_in
from tests.cluster.fakes import FakeToppings, FakeVllm, serving
from tests.waiting import PATIENCE_S, until
from toppings.cluster.router.background import start_once
from toppings.cluster.router.exchange import Exchange, current_exchange
from toppings.exchanges.audit_log import AuditLog
from toppings.exchanges.denied import DENIED_PER_MINUTE
from toppings.exchanges.request_log import RequestLog
from toppings.log_files import MAX_QUEUED_LINES, JsonLines, RotatingFile
from toppings.tenants.account import Account
from toppings.tenants.file import KeyEntry, TenantsFile
from toppings.tenants.tenant import Tenant

NAMED = {"X-Request-Id": "mine"}


async def ask(client: Client, **body: Any) -> int:
    body = {"model": "small", "prompt": "hello", "max_tokens": 4, **body}
    async with client.call("POST", "/v1/completions", body, headers=NAMED) as response:
        await response.read()
        return int(response.status)


async def test_a_request_has_a_line(two_servers: Any, start_router: Start, tmp_path: Path) -> None:
    (_, url), (_, other) = two_servers
    async with start_router(url, other, records=tmp_path, policy="first_fit") as client:
        for is_stream in (False, True):
            assert await ask(client, stream=is_stream) == 200
        whole, stream = await records_in(tmp_path / "requests.jsonl", 2)
        metrics = client.router.state.meters.render().decode()
    for line in (whole, stream):
        assert (line["request_id"], line["tenant"], line["path"]) == ("mine", "", "/v1/completions")
        assert (line["model"], line["adapter"], line["status"]) == ("small", "small", 200)
        assert (line["outcome"], line["server"], line["attempts"], line["moves"]) == ("answered", "s0", 1, 0)
        assert line["completion_tokens"] == 4
        assert line["why"]
        assert 0 <= line["wait_ms"] <= line["e2e_ms"]
        assert 0 < line["tpt_ms"] <= line["e2e_ms"]
        assert "error" not in line
    assert whole["ttft_ms"] is None
    assert stream["wait_ms"] <= stream["ttft_ms"] <= stream["e2e_ms"]
    assert "toppings_router_log_dropped_total" in metrics


async def test_what_a_server_did_not_take_is_told_of_the_one_that_did(
    start_router: Start, tmp_path: Path
) -> None:
    busy = FakeVllm()
    busy.behaviour.mode = "busy"
    with serving(busy) as first, serving(FakeVllm()) as second:
        async with start_router(first, second, records=tmp_path, policy="first_fit") as client:
            assert await ask(client) == 200
            client.router.state.upstreams["s1"].is_draining = True
            client.router.state.refresh_open(client.router.state.upstreams["s1"])
            assert await ask(client) == 429
            moved, rejected = await records_in(tmp_path / "requests.jsonl", 2)
            metrics = client.router.state.meters.render().decode()
    assert (moved["server"], moved["attempts"]) == ("s1", 2)
    assert "s0 did not take it" in moved["why"]
    assert (rejected["outcome"], rejected["error"]) == ("rejected", "s0 answered 429")
    assert 'toppings_router_rejected_total{reason="servers"} 1.0' in metrics


async def test_what_was_refused_or_failed_says_why(start_router: Start, tmp_path: Path) -> None:
    server = FakeVllm()
    with serving(server) as url:
        async with start_router(url, records=tmp_path, request_log=1e-9) as client:
            assert await ask(client, model="nobody") == 404  # not in the share
            server.behaviour.mode = "cut"
            assert await ask(client, stream=True) == 200
            client.router.state.upstreams["s0"].is_draining = True
            client.router.state.refresh_open(client.router.state.upstreams["s0"])
            assert await ask(client) == 503
            cut, nobody = await records_in(tmp_path / "requests.jsonl", 2)
            metrics = client.router.state.meters.render().decode()
    assert (cut["status"], cut["outcome"], cut["completion_tokens"]) == (200, "cut", 2)
    assert "after the first token" in cut["error"]
    assert (nobody["status"], nobody["outcome"], nobody["server"]) == (503, "error", None)
    assert nobody["error"] == "no server is up for this model"
    assert 'toppings_router_refused_total{status="404"} 1.0' in metrics
    assert 'toppings_router_refused_total{status="503"} 1.0' in metrics


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_client_that_leaves_is_told_so(is_stream: bool, start_router: Start, tmp_path: Path) -> None:
    server = FakeVllm()
    server.behaviour.max_sent = 1
    with serving(server) as url:
        async with start_router(url, records=tmp_path) as client:
            asking = asyncio.create_task(ask(client, stream=is_stream))
            await until(lambda: server.seen and (server.running or not is_stream))
            await until(lambda: all(f.has_begun or not is_stream for f in client.router.state.flights))
            asking.cancel()
            [line] = await records_in(tmp_path / "requests.jsonl", 1)
            server.behaviour.max_sent = None
    assert (line["outcome"], line["status"]) == ("abort", 200 if is_stream else 499)


async def test_nothing_is_kept_where_nothing_is_asked_for(
    two_servers: Any, start_router: Start, tmp_path: Path
) -> None:
    (_, url), _ = two_servers
    async with start_router(url, records=tmp_path, request_log=0, audit_log="off") as client:
        assert await ask(client) == 200
    assert list(tmp_path.iterdir()) == []


async def change(client: Client, method: str, path: str, body: object = None) -> int:
    async with client.call(method, path, body, headers=NAMED) as response:
        assert response.headers.getall("X-Request-Id") == ["mine"]
        return int(response.status)


async def test_changes_are_told_and_go_to_the_servers_under_their_id(
    two_servers: Any, start_router: Start, tmp_path: Path
) -> None:
    (first, url), (second, other) = two_servers
    async with start_router(url, records=tmp_path) as client:
        load = {"lora_name": "new", "lora_path": "/adapters/new"}
        assert await change(client, "POST", "/v1/load_lora_adapter", load) == 200
        assert await change(client, "POST", "/v1/load_lora_adapter", load) == 400
        assert first.headers[-1]["x-request-id"] == "mine"
        assert await change(client, "POST", "/instances", {"url": other, "id": "b"}) == 201
        assert await change(client, "POST", "/instances/b/drain") == 200
        assert await change(client, "DELETE", "/instances/b") == 202
        assert await change(client, "POST", "/v1/unload_lora_adapter", {"lora_name": "new"}) == 200
        assert await change(client, "POST", "/instances", {"url": client.url, "id": "itself"}) == 400
        lines = await records_in(tmp_path / "audit.jsonl", 7)
    assert [(line["action"], line["outcome"]) for line in lines] == [
        ("load", "done"),
        ("load", "failed"),
        ("add instance", "done"),
        ("drain instance", "done"),
        ("remove instance", "done"),
        ("unload", "done"),
        ("add instance", "failed"),
    ]
    assert {(line["request_id"], line["tenant"], line["client"]) for line in lines} == {
        ("mine", "", "127.0.0.1")
    }
    assert (lines[0]["adapter"], lines[0]["path"]) == ("new", "/adapters/new")
    assert "already been loaded" in lines[1]["error"]
    assert (lines[2]["instance"], lines[2]["url"]) == ("b", other)
    assert not any("x-request-id" in headers for headers in second.headers)  # it got what it missed by itself


async def test_what_a_placement_has_servers_do_is_told(
    two_servers: Any, start_router: Start, tmp_path: Path
) -> None:
    (_, url), (second, other) = two_servers
    async with start_router(url, other, records=tmp_path) as client:
        admin, upstream = client.router.admin, client.router.state.upstreams["s1"]
        assert await admin.place(upstream, "new", "/adapters/new")
        second.refuses_loads = True
        assert not await admin.place(upstream, "newer", "/adapters/newer")
        assert await admin.displace(upstream, "new")
        lines = await records_in(tmp_path / "audit.jsonl", 3)
    assert [(line["action"], line["adapter"], line["outcome"]) for line in lines] == [
        ("place", "new", "done"),
        ("place", "newer", "failed"),
        ("displace", "new", "done"),
    ]
    assert {line["instance"] for line in lines} == {"s1"}
    assert "request_id" not in lines[0]


async def test_what_a_request_has_begun_is_not_about_it() -> None:
    """A server's watch goes on for days after the request that has added it."""
    seen: list[object] = []

    async def look() -> None:
        seen.append(current_exchange.get())

    def begin() -> "asyncio.Task[None]":
        current_exchange.set(Exchange("mine"))
        return start_once("looking", look)

    await copy_context().run(begin)
    assert seen == [None]


async def test_errors_have_the_id_in_the_words_of_their_dialect(start_router: Start) -> None:
    with serving(FakeToppings()) as url:
        async with start_router(url) as client:
            client.router.state.upstreams["s0"].is_draining = True
            client.router.state.refresh_open(client.router.state.upstreams["s0"])
            for path in ("/v1/messages", "/v1/messages/nowhere"):
                body = {"model": "small", "messages": [], "max_tokens": 1}
                async with client.call("POST", path, body, headers=NAMED) as response:
                    told = await response.json()
                    assert response.status >= 400
                    assert told["request_id"] == response.headers["request-id"] == "mine"
            async with client.call("POST", "/v1/completions", {}, headers={"Expect": "x", **NAMED}) as reply:
                assert (reply.status, reply.headers["X-Request-Id"]) == (417, "mine")


async def test_a_server_that_answers_under_another_id_changes_none(start_router: Start) -> None:
    """Logs would speak of one request by two names."""
    server = FakeVllm()
    server.extra_headers = {"X-Request-Id": "theirs"}
    with serving(server) as url:
        async with start_router(url) as client:
            for is_stream in (False, True):
                body = {"model": "small", "prompt": "x", "stream": is_stream}
                async with client.call("POST", "/v1/completions", body, headers=NAMED) as reply:
                    assert reply.headers.getall("X-Request-Id") == ["mine"]


@pytest.mark.parametrize("log", ["audit", "requests"])
async def test_what_is_denied_cannot_push_out_what_was_done(log: str, tmp_path: Path) -> None:
    lines, now = JsonLines(str(tmp_path / "told.jsonl")), 0.0
    note, path = {
        "audit": (AuditLog(lines, clock=lambda: now).note_exchange, "/v1/load_lora_adapter"),
        "requests": (RequestLog(lines, 1.0, clock=lambda: now).note, "/v1/completions"),
    }[log]
    denied = Exchange("mine", path, method="POST", status=401, error="no key")
    for _ in range(DENIED_PER_MINUTE + 7):
        note(denied)
    now += 60.0
    note(denied)
    told = await records_in(tmp_path / "told.jsonl", DENIED_PER_MINUTE + 1)
    lines.close()
    assert [line.get("untold") for line in told] == [*[None] * DENIED_PER_MINUTE, 7]


async def test_of_those_who_have_a_key_and_of_what_failed_every_request_has_a_line(tmp_path: Path) -> None:
    lines = JsonLines(str(tmp_path / "requests.jsonl"))
    log = RequestLog(lines, 1.0, clock=lambda: 0.0)
    num = DENIED_PER_MINUTE + 7
    known = Exchange("known", "/v1/completions", method="POST", status=400)
    known.account = Account(Tenant(name="team"), lambda: 0.0)
    for _ in range(num):
        log.note(known)
        log.note(Exchange("failed", "/v1/completions", method="POST", status=503))
    told = await records_in(tmp_path / "requests.jsonl", 2 * num)
    lines.close()
    assert [line["request_id"] for line in told] == ["known", "failed"] * num


@pytest.mark.parametrize("char", ["a", "\U0001f600", "\0", '"', "\\", "\udc80"])
async def test_a_day_of_what_is_denied_is_less_than_10_mb(char: str, tmp_path: Path) -> None:
    lines = JsonLines(str(tmp_path / "audit.jsonl"))
    account = Account(Tenant(name="t" * 64), lambda: 0.0)
    denied = Exchange("i" * 128, f"/adapters/{char * 9000}", "DELETE", "f" * 45, account, status=403)
    denied.error = char * 2000
    AuditLog(lines).note_exchange(denied)
    [line] = await records_in(tmp_path / "audit.jsonl", 1)
    lines.close()
    assert line["action"].startswith("DELETE /adapters/")
    assert line["status"] == 403
    num_bytes = (tmp_path / "audit.jsonl").stat().st_size + len(', "untold": 1000000000')
    assert num_bytes * DENIED_PER_MINUTE * (24 * 60 + 1) < 10e6


async def test_no_key_that_has_gone_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk: they come at once, as many as the file has."""
    goes_on, append = threading.Event(), RotatingFile.append

    def slow(file: RotatingFile, data: bytes) -> None:
        goes_on.wait(PATIENCE_S)
        append(file, data)

    monkeypatch.setattr(RotatingFile, "append", slow)
    lines = JsonLines(str(tmp_path / "audit.jsonl"))
    audit, num_keys = AuditLog(lines), MAX_QUEUED_LINES + 100
    keys = [KeyEntry(id=f"k{number:05}", sha256="", tenant="team") for number in range(num_keys)]
    audit.note_tenants(TenantsFile(keys=keys), TenantsFile())
    goes_on.set()
    told = await records_in(tmp_path / "audit.jsonl", num_keys)
    lines.close()
    assert [(line["action"], line["key"], line["of"]) for line in told] == [
        ("revoke key", key.id, "team") for key in keys
    ]
    assert lines.num_dropped == 0


def test_what_is_dropped_together_is_counted_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(RotatingFile, "append", lambda *_: goes_on.wait(PATIENCE_S))
    lines = JsonLines(str(tmp_path / "audit.jsonl"))
    for _ in range(MAX_QUEUED_LINES + 1):  # one may be in the hands of the thread
        lines.write({})
    before = lines.num_dropped
    lines.write({}, {}, {})
    assert lines.num_dropped == before + 3
    goes_on.set()
    lines.close()


async def test_the_log_names_the_request_where_a_change_fails(start_router: Start) -> None:
    ids: list[str] = []

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            exchange = current_exchange.get()
            ids.append("" if exchange is None else exchange.request_id)

    log = logging.getLogger("toppings.cluster.router.adapters")
    async with start_router("http://127.0.0.1:9", health_interval_s=3600.0) as client:
        client.router.state.upstreams["s0"].is_alive = True
        log.addHandler(noting := Noting())
        try:
            load = {"lora_name": "new", "lora_path": "/adapters/new"}
            assert await change(client, "POST", "/v1/load_lora_adapter", load) == 504
        finally:
            log.removeHandler(noting)
    assert set(ids) == {"mine"}
