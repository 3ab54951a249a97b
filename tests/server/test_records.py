"""The request log and the audit log: what they say of requests and changes, and what they leave out."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from tests.server.conftest import Server
from tests.waiting import until
from toppings.config import Config
from toppings.exchanges import denied as denied_lines
from toppings.log_files import RotatingFile
from toppings.messages import ColdLayer, ColdStart
from toppings.server import admin, models
from toppings.server.records import keeping_records
from toppings.tenants.keys import add_key, revoke_key

Read = Callable[[str], list[dict[str, Any]]]


@contextmanager
def kept(server: Server, directory: Path, **settings: object) -> Iterator[Read]:
    config = Config.from_settings(settings, server.state.config)

    def read(name: str) -> list[dict[str, Any]]:
        file = directory / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    with keeping_records(server.app, config, directory):
        yield read


def register(server: Server, name: str) -> None:
    server.registry.register(name, server.state.config.server.adapters + "/adapter-00000")


async def test_a_request_has_a_line(server: Server, tmp_path: Path) -> None:
    register(server, "a")
    server.engine.num_cached_tokens = 2
    server.engine.cold_start = ColdStart("disk", 10.0, 20.0, 5.0, 2.0, rank=4, num_bytes=7,
                                         layers=[ColdLayer(None, 4, 4)])  # fmt: skip
    with kept(server, tmp_path) as read:
        body = {"model": "a", "prompt": "hello", "max_tokens": 4, "n": 2}
        await server.http.post("/v1/completions", json=body, headers={"X-Request-Id": "mine"})
    [line] = read("requests.jsonl")
    assert abs(line["at"] - time.time()) < 3600
    assert (line["request_id"], line["tenant"], line["path"]) == ("mine", "", "/v1/completions")
    assert (line["model"], line["adapter"], line["status"], line["outcome"]) == ("a", "a", 200, "length")
    assert (line["sequences"], line["completion_tokens"], line["cached_tokens"]) == (2, 8, 4)
    assert (line["start"], line["queue_ms"]) == ("cold", 1.5)
    assert 0 < line["ttft_ms"] <= line["e2e_ms"]
    assert line["tpt_ms"] > 0
    assert line["load"] == {
        **{"tier": "disk", "rank": 4, "bytes": 7, "place": "cpu"},
        **{"read_ms": 10.0, "copy_ms": 20.0, "exposed_ms": 5.0},
    }


async def test_what_was_refused_says_why(server: Server, tmp_path: Path) -> None:
    with kept(server, tmp_path) as read:
        await server.complete(model="nobody")
        await server.complete(max_tokens=-1)
        server.engine.error = "the device is gone"
        await server.complete()
        server.engine.died.set()
        await server.complete()
    lines = read("requests.jsonl")
    told = [(line["status"], line["outcome"]) for line in lines]
    assert [line["model"] for line in lines[:2]] == ["nobody", ""]
    assert told == [(404, "refused"), (400, "refused"), (500, "error"), (503, "error")]
    assert "nobody" in lines[0]["error"]
    assert lines[2]["error"] == "the device is gone"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "model": "NAME"}),
        ("/v1/messages", {"messages": [], "max_tokens": 1, "model": "NAME"}),
        ("/generate", {"inputs": "a", "lora_dir": "NAME"}),
        ("/generate", {"inputs": "a", "parameters": {"adapter_id": "NAME"}}),
        ("/v1/completions", {"prompt": 1.5, "model": "NAME"}),
    ],
)
@pytest.mark.parametrize("name", ["nobody", "x" * 5000])
async def test_a_refused_request_has_the_model_that_it_named(
    server: Server, tmp_path: Path, path: str, body: dict[str, Any], name: str
) -> None:
    with kept(server, tmp_path) as read:
        content = json.dumps(body).replace("NAME", name)
        assert 400 <= (await server.http.post(path, content=content)).status_code < 500
    [line] = read("requests.jsonl")
    assert line["model"][:100] == name[:100]
    assert len(line["model"]) < 300


@pytest.mark.parametrize("body", [[], "x", {"model": 1}, {"model": None, "parameters": [1]}], ids=str)
async def test_what_names_no_model_has_none(server: Server, tmp_path: Path, body: object) -> None:
    with kept(server, tmp_path) as read:
        assert (await server.http.post("/v1/completions", json=body)).status_code == 400
    assert [line["model"] for line in read("requests.jsonl")] == [""]


async def test_a_client_that_leaves_is_told_so(server: Server, url: str, tmp_path: Path) -> None:
    server.engine.gate.clear()
    with kept(server, tmp_path) as read:
        async with httpx.AsyncClient(timeout=60) as http:
            body = {"prompt": "hello", "stream": True}
            asking = asyncio.create_task(http.post(f"{url}/v1/completions", json=body))
            await until(lambda: server.engine.calls)
            asking.cancel()
            await asyncio.wait({asking})
        await until(lambda: read("requests.jsonl"))
    assert read("requests.jsonl")[0]["outcome"] == "abort"


async def test_a_share_of_the_requests_is_the_same_on_every_server(server: Server, tmp_path: Path) -> None:
    async def ask(directory: Path, share: float) -> set[str]:
        server.app.state.observers.clear()
        with kept(server, directory, request_log=share) as read:
            for number in range(40):
                headers = {"X-Request-Id": f"r{number}"}
                await server.http.post(
                    "/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers
                )
        return {line["request_id"] for line in read("requests.jsonl")}

    half = await ask(tmp_path / "one", 0.5)
    assert 5 < len(half) < 35
    assert await ask(tmp_path / "two", 0.5) == half
    assert await ask(tmp_path / "none", 0.0) == set()
    assert not (tmp_path / "none" / "requests.jsonl").exists()


async def test_what_the_server_failed_is_never_left_out(server: Server, tmp_path: Path) -> None:
    server.engine.error = "broken"
    with kept(server, tmp_path, request_log=1e-9) as read:
        await server.complete()
    assert [line["outcome"] for line in read("requests.jsonl")] == ["error"]


async def test_only_what_asks_for_tokens_is_a_request(server: Server, tmp_path: Path) -> None:
    with kept(server, tmp_path) as read:
        await server.http.get("/v1/models")
        await server.post("/tokenize", prompt="hello")
    assert read("requests.jsonl") == []


async def test_changes_of_adapters_are_told(server: Server, tmp_path: Path) -> None:
    root = server.state.config.server.adapters
    with kept(server, tmp_path) as read:
        headers = {"X-Request-Id": "mine"}
        body = {"lora_name": "new", "lora_path": f"{root}/adapter-00000"}
        await server.http.post("/v1/load_lora_adapter", json=body, headers=headers)
        await server.post("/v1/load_lora_adapter", **body)  # it is there already
        await server.http.post("/adapters/new/pin", json={})
        await server.http.post("/adapters/new/prefetch", json={})
        await server.http.request("DELETE", "/adapters/new/pin", json={})
        await server.post("/v1/unload_lora_adapter", lora_name="new")
    lines = read("audit.jsonl")
    assert [(line["action"], line["outcome"]) for line in lines] == [
        *[("load", "done"), ("load", "failed"), ("pin", "done"), ("prefetch", "done"), ("unpin", "done")],
        ("unload", "done"),
    ]
    assert {line["adapter"] for line in lines} == {"new"}
    assert (lines[0]["request_id"], lines[0]["client"]) == ("mine", "127.0.0.1")
    assert "already" in lines[1]["error"]


class TestTenants:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> dict[str, object]:
        (tmp_path / "tenants.yaml").write_text("tenants:\n  team: {}\nkeys: []\n")
        return {"tenants_file": str(tmp_path / "tenants.yaml"), "api_key": "root"}

    async def test_keys_that_come_and_go_are_told_by_their_ids(self, server: Server, tmp_path: Path) -> None:
        file = tmp_path / "tenants.yaml"
        with kept(server, tmp_path / "logs") as read:
            key = add_key(file, "team")
            await until(lambda: len(read("audit.jsonl")) == 1)
            headers = {"Authorization": f"Bearer {key.text}"}
            await server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers)
            revoke_key(file, key.entry.id)
            await until(lambda: len(read("audit.jsonl")) == 2)
        [request] = read("requests.jsonl")
        assert (request["tenant"], request["key"], request["client"]) == ("team", key.entry.id, "127.0.0.1")
        lines = read("audit.jsonl")
        assert [(line["action"], line["key"], line["of"]) for line in lines] == [
            ("add key", key.entry.id, "team"),
            ("revoke key", key.entry.id, "team"),
        ]
        assert key.text not in (tmp_path / "logs" / "audit.jsonl").read_text()

    async def test_a_wrong_key_is_nobodys_and_counted(self, server: Server, tmp_path: Path) -> None:
        with kept(server, tmp_path / "logs") as read:
            for key in ("wrong", "root"):
                headers = {"Authorization": f"Bearer {key}"}
                body = {"prompt": "a", "max_tokens": 1}
                await server.http.post("/v1/completions", json=body, headers=headers)
            metrics = (await server.http.get("/metrics", headers=headers)).text
        told = [(line["status"], line["tenant"], line["key"]) for line in read("requests.jsonl")]
        assert told == [(401, None, None), (200, "", None)]
        assert 'toppings:denied_total{status="401"} 1.0' in metrics
        assert "wrong" not in (tmp_path / "logs" / "requests.jsonl").read_text()

    async def test_an_expired_key_is_told_and_whose_it_is(self, server: Server, tmp_path: Path) -> None:
        key = add_key(tmp_path / "tenants.yaml", "team", "2999-01-01")
        server.state.book.reload()
        server.state.book.wall_clock = lambda: datetime(2999, 1, 2, tzinfo=UTC).timestamp()
        headers = {"Authorization": f"Bearer {key.text}"}
        with kept(server, tmp_path / "logs") as read:
            for path in ("/v1/completions", "/v1/load_lora_adapter"):
                reply = await server.http.post(path, json={"prompt": "a"}, headers=headers)
                assert reply.status_code == 401
        for line in (*read("requests.jsonl"), *read("audit.jsonl")):
            assert (line["tenant"], line["key"], line["status"]) == ("team", key.entry.id, 401)
        assert [len(read(name)) for name in ("requests.jsonl", "audit.jsonl")] == [1, 1]
        assert server.state.num_open == 0

    async def test_changes_that_were_denied_are_told(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(denied_lines, "DENIED_PER_MINUTE", 60)
        routes = [
            (method, route.path.replace("{name:path}", "a"))
            for router in (models.changing, admin.changing)
            for route in router.routes
            if isinstance(route, Route)
            for method in route.methods or ()
        ]
        assert len(routes) > 7
        with kept(server, tmp_path / "logs") as read:
            for method, path in routes:
                await server.http.request(method, path, json={})
            key = add_key(tmp_path / "tenants.yaml", "team")
            server.state.book.reload()
            headers = {"Authorization": f"Bearer {key.text}", "X-Request-Id": "mine"}
            body = {"lora_name": "theirs", "lora_path": "x"}
            await server.http.post("/v1/load_lora_adapter", json=body, headers=headers)
            await server.http.get("/stats", headers=headers)  # no change
        *denied, added, refused = read("audit.jsonl")
        assert [(line["action"], line["outcome"], line["status"]) for line in denied] == [
            (f"{method} {path}", "denied", 401) for method, path in routes
        ]
        assert added["action"] == "add key"
        assert (refused["status"], refused["tenant"], refused["request_id"]) == (403, "team", "mine")
        assert refused["key"] == key.entry.id
        assert "theirs" in refused["error"]
        assert key.text not in (tmp_path / "logs" / "audit.jsonl").read_text()

    async def test_a_key_that_is_another_under_its_id_is_told(self, server: Server, tmp_path: Path) -> None:
        """Its tenant, or the value that opens: who reads the log sees that others have got in."""
        file = tmp_path / "tenants.yaml"
        first, second = "0" * 64, "1" * 64

        def write(tenant: str, sha256: str) -> None:
            keys = [{"id": "a", "tenant": tenant, "sha256": sha256}]
            new = tmp_path / tenant / sha256  # moved there whole: the file may be read at any time
            new.parent.mkdir(exist_ok=True)
            new.write_text(json.dumps({"tenants": {"team": {}, "rich": {}}, "keys": keys}))
            new.replace(file)

        write("team", first)
        server.state.book.reload()
        with kept(server, tmp_path / "logs") as read:
            write("rich", first)
            await until(lambda: server.state.book.reload() or read("audit.jsonl"))
            await until(lambda: len(read("audit.jsonl")) == 1)
            write("rich", second)
            await until(lambda: server.state.book.reload() or len(read("audit.jsonl")) == 2)
            await until(lambda: len(read("audit.jsonl")) == 2)
        assert [
            (line["action"], line["key"], line["of"], line["changed"]) for line in read("audit.jsonl")
        ] == [
            ("change key", "a", "rich", ["tenant"]),
            ("change key", "a", "rich", ["sha256"]),
        ]
        assert second not in (tmp_path / "logs" / "audit.jsonl").read_text()


async def test_they_are_moved_aside_when_they_are_full(server: Server, tmp_path: Path) -> None:
    with kept(server, tmp_path, max_log_bytes=400):
        for _ in range(6):
            await server.complete(max_tokens=1)
    assert (tmp_path / "requests.jsonl.1").exists()


async def test_a_full_disk_stops_no_request(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: RotatingFile) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RotatingFile, "_open", full)
    with kept(server, tmp_path):
        assert (await server.complete(max_tokens=1)).status_code == 200
        root = server.state.config.server.adapters
        await server.post("/v1/load_lora_adapter", lora_name="new", lora_path=f"{root}/adapter-00000")

        async def dropped() -> dict[str, float]:
            text = (await server.http.get("/metrics")).text
            found = re.findall(r'^toppings:log_dropped_total\{file="(\S+)"\} (\S+)$', text, re.MULTILINE)
            return {name: float(value) for name, value in found}

        await until(lambda: all(num_dropped() for num_dropped in server.state.metrics.logs.values()))
        assert await dropped() == {"audit.jsonl": 1, "requests.jsonl": 1, "steps.jsonl": 0}
