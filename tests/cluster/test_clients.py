"""What clients may send: bodies, hosts, keys and names of every kind; the router itself never fails of it."""

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import Start
from tests.cluster.fakes import FakeVllm, serving
from toppings.access import why_not_changed
from toppings.cluster.router.exchange import Exchange, current_exchange
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.config import ConfigError
from toppings.exchanges.log_lines import NamingFormatter

DEEP = b"[" * 100_000 + b"]" * 100_000
BODIES = {
    "deep": b'{"model": "small", "prompt": %s}' % DEEP,
    "deep extra field": b'{"model": "small", "zz": %s}' % DEEP,
    "deep parameters": b'{"parameters": {"a": %s}}' % DEEP,
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "a lone surrogate": b'{"model": "\\ud800"}',
    "a long name": b'{"model": "%s"}' % (b"x" * 2**20),
    "nothing": b"",
    "no object": b"null",
}
ROUTES = ("/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream")
ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/instances")


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
async def test_no_body_makes_the_router_fail(start_router: Start, body: bytes) -> None:
    class Refusing(FakeVllm):
        async def generate(self, request: Any) -> Any:
            from starlette.responses import JSONResponse

            return JSONResponse({"error": {"message": "a bad body"}}, 400)

    with serving(Refusing()) as url:
        async with start_router(url) as client:
            for path in (*ROUTES, *ADMIN):
                headers = {"Content-Type": "application/json"}
                async with client._session.post(client.url + path, data=body, headers=headers) as response:
                    text = await response.text()
                    assert 400 <= response.status < 500, (path, text[:300])
                    assert len(text) < 1000


async def test_bodies_of_all_requests_together_are_bounded(start_router: Start) -> None:
    slow = FakeVllm()
    slow.behaviour.max_sent = 0
    with serving(slow) as url:
        async with start_router(url, max_buffered_bytes=3000) as client:

            async def ask() -> int:
                async with client.complete(prompt="x" * 2000) as response:
                    return int(response.status)

            asked = [asyncio.create_task(ask()) for _ in range(2)]
            (refused,), (held,) = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            slow.behaviour.max_sent = None
            assert (refused.result(), await held) == (503, 200)
            assert await ask() == 200


async def test_a_compressed_body_is_refused_clearly(start_router: Start) -> None:
    with serving(FakeVllm()) as url:
        async with start_router(url) as client:
            headers = {"Content-Encoding": "gzip"}
            async with client.call("POST", "/v1/completions", {}, headers=headers) as response:
                assert response.status == 415


@pytest.mark.parametrize(
    ("host", "origin", "may"),
    [
        ("127.0.0.1:8090", None, True),
        ("localhost:8090", "http://localhost:8090", True),
        ("[::1]:8090", None, True),
        ("box.local:8090", None, True),
        ("rebound.example:8090", "http://rebound.example:8090", False),
        ("", None, False),
        ("127.0.0.1:8090", "http://evil.example", False),
        ("127.0.0.1:8090", "http://[", False),
        ("[", None, False),
    ],
)
def test_without_a_key_only_this_machines_names_may_change_the_fleet(
    host: str, origin: str | None, may: bool
) -> None:
    assert (why_not_changed("127.0.0.1", host, origin, "box.local") is None) is may
    assert why_not_changed("10.0.0.1", host, origin, "box.local") is not None


async def test_a_rebound_name_may_not_change_the_fleet(start_router: Start) -> None:
    with serving(FakeVllm()) as url:
        async with start_router(url) as client:
            headers = {"Host": "rebound.example", "Origin": "http://rebound.example"}
            for path in ("/instances/s0/drain", *ADMIN):
                async with client.call("POST", path, {}, headers=headers) as response:
                    assert response.status == 403


def test_keys_come_from_settings_files_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text("from-file\n")
    monkeypatch.setenv("TOPPINGS_API_KEY", "from-environment")
    monkeypatch.setenv("TOPPINGS_UPSTREAM_API_KEY", "theirs")
    config = RouterConfig(api_key_file=str(tmp_path / "key")).with_keys()
    assert (config.api_key, config.upstream_api_key) == ("from-file", "theirs")
    assert RouterConfig().with_keys().api_key == "from-environment"
    assert RouterConfig(api_key="given").with_keys().api_key == "given"
    with pytest.raises(ConfigError, match="cannot read upstream_api_key_file"):
        RouterConfig(upstream_api_key_file=str(tmp_path / "none")).with_keys()


@pytest.mark.parametrize(
    "instance",
    [
        {"id": "a\r\nX-Evil: 1"},
        {"id": "a b"},
        {"id": "x" * 200},
        {"url": "http://a:1\r\nX: y"},
        {"url": "http://user:secret@a:1"},
        {"url": "http://a:99999"},
        {"url": "http://["},
        {"url": "http://a:1/?x"},
    ],
)
async def test_ids_and_urls_that_could_break_a_header_are_refused(
    start_router: Start, instance: dict[str, str]
) -> None:
    body = {"url": "http://127.0.0.1:1", **instance}
    with pytest.raises(ConfigError):
        InstanceConfig.of(body)
    with serving(FakeVllm()) as url:
        async with start_router(url) as client, client.call("POST", "/instances", body) as response:
            assert response.status == 400


async def test_a_performance_model_that_is_no_file_is_refused_at_once(
    start_router: Start, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with serving(FakeVllm()) as url:
        async with start_router(url) as client:
            body = {"url": "http://127.0.0.1:1", "perf_model": str(tmp_path / "pipe")}
            async with client.call("POST", "/instances", body) as response:
                assert response.status == 400


def test_lines_of_the_log_name_the_request_that_they_are_about() -> None:
    formatter = NamingFormatter("%(levelname)s %(message)s", current_exchange.get)
    record = logging.LogRecord("x", logging.INFO, __file__, 0, "on b: it failed", None, None)
    assert formatter.format(record) == "INFO on b: it failed"
    token = current_exchange.set(Exchange("mine"))
    try:
        assert formatter.format(record) == "INFO on b: it failed [request mine]"
    finally:
        current_exchange.reset(token)
