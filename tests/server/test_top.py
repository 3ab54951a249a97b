"""`toppings top` against a server over a fake engine, and where there is none."""

import asyncio
import socket
from collections.abc import Iterator
from itertools import islice

import pytest
from typer.testing import CliRunner, Result

from tests.server.conftest import Server
from tests.server.test_dashboard import adapter
from tests.waiting import until
from toppings.cli import top
from toppings.command import app
from toppings.remote import RemoteServer

OK = b"HTTP/1.1 200 OK\r\n\r\n"
RUDE = "[bold]x[/] \x1b[2J\x1b]0;title\x07"


async def run(*args: str) -> Result:
    """Beside the loop that the server runs in."""
    return await asyncio.to_thread(CliRunner().invoke, app, ["top", *args])


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


async def test_it_shows_the_essentials_once(server: Server, url: str) -> None:
    root = server.state.config.server.adapters
    ids = [server.registry.register(name, f"{root}/adapter-00000").adapter_id for name in ("warm", "coming")]
    server.engine.adapters = [adapter(ids[0], num_hits=7), adapter(ids[1], device_layers=1, num_running=1)]
    server.engine.gate.clear()
    asked = asyncio.create_task(server.complete(model="coming", max_tokens=2))
    await until(lambda: server.engine.num_pending == 1)
    result = await run(url, "--once")
    server.engine.gate.set()
    await asked
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert any(line.startswith("base, mode auto (") and line.endswith("): ready") for line in lines)
    assert "│ 1 │ 1 │ 1 │ 0 │ 0 │ -/- ms │ -/- ms │ 25 % │" in lines
    assert "│ - │ coming │ 1 │ 0 │" in lines
    assert "adapters: 2 registered; 1 device, 1 loading, 0 host, 0 reading" in lines
    assert "│ coming │ loading │ 1/2 │ 1 │ 0 │ 0 │" in lines
    assert "│ warm │ device │ 2/2 │ 0 │ 0 │ 7 │" in lines


async def test_it_looks_again_and_says_when_the_server_is_away(server: Server, url: str) -> None:
    looks = top._looks(RemoteServer(url), 0.0)
    assert not isinstance(await asyncio.to_thread(next, looks), str)
    await server.http.aclose()
    away = top._looks(RemoteServer("http://127.0.0.1:1"), 0.0)
    said = await asyncio.to_thread(lambda: list(islice(away, 2)))
    assert all(isinstance(each, str) and each.endswith("; asking again") for each in said)


async def test_names_are_neither_markup_nor_a_terminals_commands(server: Server, url: str) -> None:
    root = server.state.config.server.adapters
    server.registry.register("plain", f"{root}/adapter-00000")
    server.engine.gate.clear()
    asked = asyncio.create_task(server.complete(model="plain", max_tokens=1))
    await until(lambda: server.engine.num_pending == 1)
    [lease] = server.state._leases
    lease.model = RUDE
    result = await run(url, "--once")
    server.engine.gate.set()
    await asked
    assert "[bold]x[/] ?[2J?]0;title?" in result.output
    assert "\x1b" not in result.output


class TestWithAKey:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"api_key": "the-one"}

    async def test_a_wrong_key_is_told(self, url: str) -> None:
        for args in ((), ("--api-key", "wrong")):
            result = await run(url, "--once", *args)
            assert isinstance(result.exception, ValueError)
            assert "answered 401" in str(result.exception)
        assert (await run(url, "--once", "--api-key", "the-one")).exit_code == 0


def failure(result: Result) -> str:
    assert isinstance(result.exception, ValueError)
    return str(result.exception)


async def test_no_server_is_told(closed_port: int) -> None:
    assert "cannot reach http://127.0.0.1:" in failure(await run(f"http://127.0.0.1:{closed_port}", "--once"))
    assert "must start with http://" in failure(await run("127.0.0.1:8000", "--once"))


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "1e9"])
async def test_an_interval_out_of_range_is_told(interval: str) -> None:
    said = failure(await run("http://127.0.0.1:1", "--interval", interval))
    assert "it must be from 0.2 to 3600 seconds" in said


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n\r\n[1]", b"HTTP/1.1 200 OK\r\n\r\n\xff", b""]
)
async def test_what_is_no_toppings_server_is_told(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        said = failure(await run(f"http://127.0.0.1:{port}", "--once"))
    assert f"http://127.0.0.1:{port}" in said
