import asyncio
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import httpx
import pytest

from tests.server.conftest import Server
from tests.waiting import PATIENCE_S
from tests.warm import WARM
from toppings.config import Config, ConfigError
from toppings.engine.client import EngineClient
from toppings.engine.spawn import Spawner
from toppings.server import lifecycle
from toppings.server.lifecycle import listening_socket, run_until_stopped, start_logging, with_run_files
from toppings.stop import Stop


class Running:
    """The server's main part, over a fake engine, on a port of its own."""

    def __init__(self, server: Server, listener: socket.socket) -> None:
        self.server = server
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.stop = Stop()
        client = cast(EngineClient, server.engine)
        self.task = asyncio.create_task(
            run_until_stopped(server.state.config, server.app, client, listener, self.stop)
        )

    async def post(self, **body: object) -> httpx.Response:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
            return await http.post(f"{self.url}/v1/completions", json={"prompt": "hello", **body})


@pytest.fixture
def settings() -> dict[str, object]:
    return {"port": 0, "shutdown_timeout_s": 0.2}


@pytest.fixture
async def running(server: Server) -> AsyncIterator[Running]:
    with listening_socket(server.state.config) as listener:
        running = Running(server, listener)
        while True:
            try:
                assert (await running.post()).status_code == 200
                break
            except httpx.ConnectError:
                await asyncio.sleep(0.01)
        server.engine.calls.clear()
        yield running
        running.stop.set()
        await running.task


async def test_a_signal_lets_running_requests_finish(running: Running) -> None:
    running.server.engine.delay_s = 0.005
    open_request = asyncio.create_task(running.post(max_tokens=10))
    while not running.server.engine.calls:
        await asyncio.sleep(0.001)
    running.stop.set()
    assert (await open_request).json()["usage"]["completion_tokens"] == 10
    assert await running.task == 0


async def test_a_signal_cuts_what_runs_beyond_the_deadline(running: Running) -> None:
    running.server.engine.gate.clear()
    open_request = asyncio.create_task(running.post(max_tokens=50))
    while not running.server.engine.calls:
        await asyncio.sleep(0.001)
    running.stop.set()
    reply = await open_request
    assert (reply.status_code, reply.json()["error"]["type"]) == (503, "ServiceUnavailableError")
    assert await running.task == 0


async def test_new_requests_get_503_while_others_finish(running: Running) -> None:
    running.server.engine.gate.clear()
    open_request = asyncio.create_task(running.post())
    while not running.server.engine.calls:
        await asyncio.sleep(0.001)
    running.stop.set()
    while not running.server.state.is_draining:
        await asyncio.sleep(0.001)
    assert (await running.post()).status_code == 503
    await open_request


async def test_a_second_signal_cuts_at_once(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines = []
    shutdown = running.server.engine.shutdown

    async def recorded(deadline_s: float) -> None:
        deadlines.append(deadline_s)
        await shutdown(deadline_s)

    monkeypatch.setattr(running.server.engine, "shutdown", recorded)
    running.server.engine.gate.clear()
    open_request = asyncio.create_task(running.post(max_tokens=50))
    while not running.server.engine.calls:
        await asyncio.sleep(0.001)
    running.stop.set()
    while not deadlines:
        await asyncio.sleep(0.001)
    running.stop.set()
    assert (await open_request).status_code == 503
    assert await running.task == 0
    assert deadlines == [0.2, 0.0]


async def test_the_engines_death_ends_the_server_with_an_error(running: Running) -> None:
    running.server.engine.gate.clear()
    open_request = asyncio.create_task(running.post())
    while not running.server.engine.calls:
        await asyncio.sleep(0.001)
    running.server.engine.died.set()
    assert (await open_request).json()["error"]["type"] == "EngineDeadError"
    assert await running.task == 1


async def test_the_log_says_where_it_runs(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    for name in ("uvicorn", "uvicorn.error"):  # other servers in this process may have set them up their way
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        monkeypatch.setattr(logging.getLogger(name), "level", logging.INFO)
    with listening_socket(server.state.config) as listener:
        running = Running(server, listener)
        while f"Uvicorn running on {running.url}" not in caplog.text:
            await asyncio.sleep(0.01)
        running.stop.set()
        await running.task


async def test_collections_of_garbage_pass_over_what_has_started(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full one would hold the event loop for as long as it takes to look at all that was imported."""

    async def client(*_: object, **__: object) -> object:
        return server.engine

    monkeypatch.setattr(lifecycle, "_hold_state", lambda _: None)
    monkeypatch.setattr(lifecycle, "_registry", lambda *_: server.state.registry)
    monkeypatch.setattr(lifecycle, "_text_model", lambda _: server.state.text)
    monkeypatch.setattr(EngineClient, "start", client)
    num_before = len(gc.get_objects())
    try:
        await lifecycle._start(server.state.config, Spawner(stays=False))
        assert len(gc.get_objects()) < num_before / 20
    finally:
        gc.unfreeze()


def test_a_taken_port_is_a_configuration_error() -> None:
    with listening_socket(Config.from_settings({"port": 0})) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            listening_socket(Config.from_settings({"port": port}))


def test_the_resolved_configuration_is_written_without_the_key(tmp_path: Path) -> None:
    config = Config.from_settings(
        {"model": "demo", "log_dir": str(tmp_path), "mode": "on_demand", "api_key": "secret"}
    )
    resolved = with_run_files(config)
    written = tmp_path / "on_demand" / "config.yaml"
    assert "secret" not in written.read_text()
    reread = Config.from_yaml(written)
    assert reread.engine == resolved.engine
    assert reread.engine.step_log == str(tmp_path / "on_demand" / "steps.jsonl")


def test_a_start_keeps_the_log_that_says_why_the_last_one_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.from_settings({"log_dir": str(tmp_path)})
    file = tmp_path / config.engine.mode / "server.log"
    file.parent.mkdir()
    handlers: list[logging.Handler] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **given: handlers.extend(given["handlers"]))
    for number in range(3):
        start_logging(config)
        file.write_text(f"end {number}")
    assert file.with_name("server.log.1").read_text() == "end 1"
    for handler in handlers:
        handler.close()


@contextmanager
def full_pipe() -> Iterator[int]:
    """The end to write to of a pipe that nobody reads; not a byte more goes in."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    try:
        yield writing
    finally:
        os.close(writing)
        os.close(reading)


def test_the_demo_is_served_by_one_command(tmp_path: Path) -> None:
    """The whole of it: a process, its engine, the demo's model and adapters, a signal; and nobody reads its
    standard error, which is full."""
    command = [sys.executable, "-m", "toppings", "serve", "--model", "demo"]
    command += ["--port", "0", "--num-threads", "1"]
    options = ["--log-dir", str(tmp_path / "logs"), "--state-dir", str(tmp_path / "state")]
    with full_pipe() as stderr:
        _serve_and_end([*command, *options], tmp_path, stderr)


def _serve_and_end(command: list[str], tmp_path: Path, stderr: int) -> None:
    process = subprocess.Popen(command, stderr=stderr)
    try:
        url = _wait_for_url(process, tmp_path / "logs" / "auto" / "server.log")
        models = [model["id"] for model in httpx.get(f"{url}/v1/models", timeout=PATIENCE_S).json()["data"]]
        assert models[0] == "toppings-demo"
        body = {"model": models[1], "prompt": "What is the sea?", "max_tokens": 8, "temperature": 0}
        reply = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
        assert reply.json()["choices"][0]["text"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        assert (tmp_path / "logs" / "auto" / "steps.jsonl").stat().st_size > 0
    finally:
        process.kill()
        process.wait()


HANGING = """
import sys, time
from toppings.server import lifecycle
def hang(config):
    print("loading", flush=True)
    time.sleep(3600)
lifecycle._text_model = hang
from toppings.command import main
main()
"""


def test_a_signal_during_the_start_ends_it_whatever_is_being_read(tmp_path: Path) -> None:
    """The thread that reads cannot be stopped, and no exit waits for it."""
    command = [sys.executable, "-c", HANGING, "serve", "--model", "demo", "--port", "0"]
    options = ["--log-dir", str(tmp_path / "logs"), "--state-dir", str(tmp_path / "state")]
    assert _ends_with([*command, *options], b"loading\n") == 0


STUCK = """
import asyncio, time
from toppings import stop
stop.LAST_RESORT_S = stop.TRACEBACK_S = 0.1
async def serve():
    ended = stop.Stop()
    with ended.on_signals():
        print("serving", flush=True)
        await ended.or_done()
    time.sleep(3600)
asyncio.run(serve())
"""


def test_an_end_that_hangs_is_cut_even_where_nobody_reads_its_traceback() -> None:
    assert _ends_with([sys.executable, "-c", STUCK], b"serving\n") == -signal.SIGALRM


def _ends_with(command: list[str], marker: bytes) -> int:
    """Its exit code where it gets a signal once it has said so much, and nobody reads its standard error."""
    with full_pipe() as stderr:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, env={**os.environ, WARM: "1"}
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == marker
            process.send_signal(signal.SIGTERM)
            return process.wait(PATIENCE_S)
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("host", ["\udcff", "no such host", "a" * 64 + ".example", "\0"])
def test_an_address_that_is_none_is_a_setting_that_is_wrong(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        lifecycle.listening_socket(Config.from_settings({"host": host, "port": 0}))


def _wait_for_url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    marker = "Uvicorn running on "
    while process.poll() is None:
        text = log.read_text() if log.exists() else ""
        if marker in text:
            return text.split(marker)[1].split()[0]
        time.sleep(0.05)
    raise AssertionError(f"the server ended with {process.returncode}")
