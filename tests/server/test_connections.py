"""Clients that say nothing, half of something or nonsense, and clients that do not listen; real sockets."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.server.conftest import Server
from tests.waiting import PATIENCE_S, until
from toppings.adapters.errors import StateError, StateFullError
from toppings.server import connections, lifecycle
from toppings.server.upgrades import UpgradeFilter

SOON_S = PATIENCE_S
SHORT_S = 0.2
"""A limit that a test waits for; where it does not, a busy machine has the patience."""
OK = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass
class Listening:
    port: int
    connections: connections.Connections

    async def connect(self, content: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(content)
        return reader, writer

    async def answer(self, content: bytes) -> bytes:
        """All that comes until the server closes the connection."""
        reader, writer = await self.connect(content)
        try:
            return await asyncio.wait_for(reader.read(), SOON_S)
        except ConnectionResetError:
            return b""
        finally:
            writer.close()

    @contextmanager
    def hurry(self) -> Iterator[None]:
        """What is to come has to come soon."""
        patience = self.connections.receive_timeout_s, self.connections.send_timeout_s
        self.connections.receive_timeout_s = self.connections.send_timeout_s = SHORT_S
        yield
        self.connections.receive_timeout_s, self.connections.send_timeout_s = patience

    async def is_healthy(self) -> bool:
        answer = await self.answer(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        return answer.startswith(b"HTTP/1.1 200")


@pytest.fixture
def settings() -> dict[str, object]:
    return {"port": 0, "receive_timeout_s": SOON_S, "send_timeout_s": SOON_S}


@pytest.fixture(params=["h11", "httptools"])
async def listening(
    server: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Listening]:
    module = pytest.importorskip(f"uvicorn.protocols.http.{request.param}_impl")
    base = module.H11Protocol if request.param == "h11" else module.HttpToolsProtocol
    bounded = type("BoundedProtocol", (connections.Bounded, base), {})
    monkeypatch.setattr(connections, "BoundedProtocol", bounded)
    config = server.state.config
    with lifecycle.listening_socket(config) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        running = lifecycle._make_server(config, server.app)
        task = asyncio.create_task(running.serve(sockets=[listener]))
        await until(lambda: running.started)
        yield Listening(listener.getsockname()[1], running._connections)
        running.should_exit = True
        await task


async def test_a_connection_that_says_nothing_is_closed(listening: Listening) -> None:
    with listening.hurry():
        assert await listening.answer(b"") == b""


async def begin_head(listening: Listening) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Of a connection of which the server has read the first line."""
    reader, writer = await listening.connect(b"GET / HTTP/1.1\r\n")
    await until(lambda: any(each._num_head_bytes for each in listening.connections.silent))
    return reader, writer


async def test_a_head_that_does_not_end_is_408(listening: Listening) -> None:
    reader, writer = await begin_head(listening)
    with listening.hurry():
        assert (await asyncio.wait_for(reader.readline(), SOON_S)).startswith(b"HTTP/1.1 408 ")
    writer.close()


async def test_a_head_that_trickles_is_408(listening: Listening) -> None:
    reader, writer = await begin_head(listening)

    async def trickle() -> None:
        while True:
            writer.write(b"x: y\r\n")
            await asyncio.sleep(0.02)

    task = asyncio.create_task(trickle())
    with listening.hurry():
        assert (await asyncio.wait_for(reader.readline(), SOON_S)).startswith(b"HTTP/1.1 408 ")
    task.cancel()
    writer.close()


async def test_a_second_head_that_does_not_end_is_408(listening: Listening) -> None:
    reader, writer = await listening.connect(OK)
    await asyncio.wait_for(reader.readuntil(b'{"status":"ok"}'), SOON_S)
    writer.write(b"GET / HTTP/1.1\r\n")
    await until(lambda: listening.connections.silent)
    with listening.hurry():
        assert (await asyncio.wait_for(reader.readline(), SOON_S)).startswith(b"HTTP/1.1 408 ")
    writer.close()


@pytest.mark.parametrize("piece", [b"x", b"x: y\r\n"])
async def test_a_head_without_end_is_cut_before_it_fills_the_memory(
    listening: Listening, piece: bytes
) -> None:
    with listening.hurry():
        answer = await listening.answer(b"GET / HTTP/1.1\r\n" + piece * 300_000)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
    assert await listening.is_healthy()


OFFERS = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQ\r\n",
    b"upgrade: websocket\r\nConnection: upgrade\r\n",
)


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("step", [1, 7, 10_000])
async def test_an_offer_of_another_protocol_is_ignored(listening: Listening, offer: bytes, step: int) -> None:
    """Twice on one connection, in parts of `step` bytes."""
    body = b'{"model": "base", "prompt": "upgrade:\\nx", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = head + offer + b"Content-Length: %d\r\n\r\n" % len(body) + body
    reader, writer = await listening.connect()
    for _ in range(2):
        for start in range(0, len(request), step):
            writer.write(request[start : start + step])
            await asyncio.sleep(0)
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SOON_S)
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        length = int(re.search(rb"content-length: (\d+)", answer)[1])  # type: ignore[index]
        assert b'"choices"' in await reader.readexactly(length)
    writer.close()


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8, 100])
def test_a_head_loses_its_offers_and_nothing_else(step: int) -> None:
    head = b"\r\nPOST /upgrade: HTTP/1.1\r\nUp: 1\r\nX: Upgrade: y\r\n%sUpgrades: 2\r\nU: 3\r\n\r\n"
    body = b"\r\n\r\nUpgrade: no head\r\n\r\n"
    given = head % b"UPGRADE: h2c\r\n  more\r\nupgrade:\r\n" + body
    filter_ = UpgradeFilter()
    passed = b"".join(filter_.pass_on(given[i : i + step]) for i in range(0, len(given), step))
    assert passed == head % b"" + body
    assert filter_.is_done


async def test_a_body_that_nobody_reads_does_not_keep_its_connection(listening: Listening) -> None:
    reader, writer = await listening.connect(OK[:-2] + b"Content-Length: 100\r\n\r\n")
    assert (await asyncio.wait_for(reader.readline(), SOON_S)).startswith(b"HTTP/1.1 200 ")
    with listening.hurry():
        assert (await asyncio.wait_for(reader.read(), SOON_S)).endswith(b'{"status":"ok"}')
    writer.close()


async def test_an_idle_connection_may_stay_longer(listening: Listening) -> None:
    reader, writer = await listening.connect(OK)
    for _ in range(2):
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SOON_S)
        assert head.startswith(b"HTTP/1.1 200 ")
        await reader.readexactly(len(b'{"status":"ok"}'))
        with listening.hurry():
            await asyncio.sleep(2 * SHORT_S)
        writer.write(OK)
    writer.close()


async def test_a_client_that_does_not_read_is_dropped_and_its_request_ends(
    listening: Listening, server: Server
) -> None:
    server.engine.delay_s = 0.001
    listening.connections.send_timeout_s = SHORT_S
    body = b'{"prompt": "x", "max_tokens": 120, "n": 8, "logprobs": 20, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", listening.port))
        client.sendall(head + body)
        await until(lambda: server.engine.calls and not server.state.num_open)
    assert any(call.was_aborted for call in server.engine.calls)


async def test_silent_connections_give_way_to_new_ones(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "FREE_FOR_S", 0.0)
    listening.connections.max_open = 4
    silent = [await listening.connect(b"GET / HT") for _ in range(20)]
    assert await listening.is_healthy()
    assert listening.connections.num_open <= 5
    for _, writer in silent:
        writer.close()


async def test_requests_under_way_do_not_give_way(listening: Listening, server: Server) -> None:
    server.engine.gate.clear()
    listening.connections.max_open = 2
    body = b'{"prompt": "x", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    busy = [await listening.connect(head + body) for _ in range(2)]
    await until(lambda: len(server.engine.calls) == 2)
    assert (await listening.answer(OK)).startswith(b"HTTP/1.1 503 ")
    server.engine.gate.set()
    for reader, writer in busy:
        assert (await asyncio.wait_for(reader.readline(), SOON_S)).startswith(b"HTTP/1.1 200 ")
        writer.close()


POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("error", "status", "stays"),
    [
        (StateFullError("the disk of the registry is full"), 507, True),
        (StateError("the registry is locked"), 503, True),
        (MemoryError(), 503, True),
        (KeyError("unforeseen"), 500, False),
    ],
)
async def test_a_connection_stays_open_after_a_refusal_unless_it_says_otherwise(
    listening: Listening,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
    stays: bool,
) -> None:
    """One that is closed without a word fails the client's next request."""

    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(server.state.registry, "find_named", fail)
    body = b'{"model": "a", "prompt": "x"}'
    reader, writer = await listening.connect(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), SOON_S)).lower()
    assert head.startswith(b"http/1.1 %d " % status)
    assert (b"connection: close" not in head) is stays
    if stays:
        [length] = [line for line in head.splitlines() if line.startswith(b"content-length")]
        await reader.readexactly(int(length.partition(b":")[2]))
        writer.write(OK)
        assert (await asyncio.wait_for(reader.readline(), SOON_S)).startswith(b"HTTP/1.1 200 ")
    writer.close()


class TestWhatHasToComeSoon:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"port": 0, "receive_timeout_s": SHORT_S, "send_timeout_s": SOON_S}

    async def test_a_body_that_stalls_is_408_and_closed(self, listening: Listening) -> None:
        listening.connections.receive_timeout_s = SOON_S  # of its head
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
        assert (await listening.answer(head + b'{"prompt')).startswith(b"HTTP/1.1 408 ")

    @pytest.mark.parametrize(
        "content",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"\r\n" * 1000,
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET  HTTP/1.1\r\n\r\n",
            b"GET http://[/ HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
            b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
            b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade, close\r\n\r\n",
            POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
            POST + b"Content-Length: -1\r\n\r\n",
            POST + b"Content-Length: 99999999999999999999999\r\n\r\n",
            POST + b"Transfer-Encoding: gzip\r\n\r\nx",
            POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
            POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
            POST + b"Content-Length: 3\r\nConnection: close\r\n\r\n{}{}{}{}",
            POST + b"Expect: 100-continue\r\nContent-Length: 20\r\n\r\n",
        ],
        ids=lambda content: ascii(content[-24:]),
    )
    async def test_nonsense_is_no_server_error(
        self, listening: Listening, content: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        reader, writer = await listening.connect(content)
        answer = await asyncio.wait_for(reader.read(1000), SOON_S)  # what is valid is answered and kept alive
        writer.close()
        listening.connections.receive_timeout_s = SOON_S
        assert b"HTTP/1.1 5" not in answer
        assert await listening.is_healthy()
        assert "Traceback" not in caplog.text


async def test_a_client_that_breaks_off_its_body_leaves_nothing(listening: Listening, server: Server) -> None:
    for part in (b"Content-Length: 100\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel"):
        _, writer = await listening.connect(POST + part)
        await writer.drain()
        writer.close()
    await until(lambda: not listening.connections.num_open)
    assert server.state.num_open == 0
    assert not listening.connections.silent


async def test_a_connection_over_the_limit_of_files_is_not_what_the_limit_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = {"soft": 300, "hard": 5000}
    monkeypatch.setattr("resource.getrlimit", lambda _: (limits["soft"], limits["hard"]))
    monkeypatch.setattr("resource.setrlimit", lambda _, pair: limits.update(soft=pair[0]))
    assert connections.raise_connection_limit() == 5000 - connections.RESERVED_FILES
    assert limits["soft"] == 5000
