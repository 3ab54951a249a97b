"""What clients may send: bounded, and refused by name where it is too much or no text."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.server.conftest import Server
from tests.waiting import PATIENCE_S
from toppings.server.bodies import MAX_ITEMS, MAX_TEXTS, parse
from toppings.server.errors import MAX_MESSAGE_CHARS, ApiError, describe
from toppings.server.limits import body_limit

JSON = {"content-type": "application/json"}
USER = '"messages": [{"role": "user", "content": "hi"}]'
FAMILIES = ("/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream")
BODY_ROUTES = (
    *FAMILIES,
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/load_lora_adapter",
    "/adapters",
)


async def send(server: Server, path: str, content: bytes | str) -> httpx.Response:
    return await server.http.post(path, content=content, headers=JSON)


@pytest.mark.parametrize(
    ("path", "content", "named"),
    [
        ("/v1/completions", r'{"prompt": "a\ud83d"}', "body.prompt"),
        ("/v1/completions", r'{"prompt": ["a", "b\udc00"]}', "body.prompt.1"),
        ("/v1/completions", r'{"prompt": "a", "stop": "\ud83d"}', "body.stop"),
        ("/v1/completions", r'{"prompt": "a", "stop": ["x", "\ud83d"]}', "body.stop.1"),
        ("/v1/completions", r'{"prompt": "a", "model": "\ud83d\ud83d"}', "body.model"),
        ("/v1/completions", r'{"prompt": "a", "\ud83d": 1}', "field's name in body"),
        (
            "/v1/chat/completions",
            r'{"messages": [{"role": "user", "content": "a\udc00"}]}',
            "body.messages.0.content",
        ),
        ("/v1/load_lora_adapter", r'{"lora_name": "\ud83d", "lora_path": "x"}', "body.lora_name"),
        ("/v1/load_lora_adapter", r'{"lora_name": "a", "lora_path": "\ud83d"}', "body.lora_path"),
        ("/v1/unload_lora_adapter", r'{"lora_name": "\ud83d"}', "body.lora_name"),
        ("/load_lora_adapter", r'{"lora_name": "\ud83d", "lora_path": "x"}', "body.lora_name"),
        ("/unload_lora_adapter", r'{"lora_name": "\ud83d"}', "body.lora_name"),
        ("/adapters", r'{"name": "\ud83d", "src": "x"}', "body.name"),
        ("/generate", r'{"inputs": "a\ud83d", "parameters": {}}', "body.inputs"),
        (
            "/generate",
            r'{"inputs": "a", "parameters": {"adapter_id": "\ud83d"}}',
            "body.parameters.adapter_id",
        ),
        ("/generate", r'{"inputs": "a", "parameters": {}, "lora_dir": "\ud83d"}', "body.lora_dir"),
    ],
)
async def test_half_of_a_surrogate_pair_is_refused_with_its_place(
    server: Server, path: str, content: str, named: str
) -> None:
    reply = await send(server, path, content)
    assert reply.status_code in (400, 422)
    assert named in reply.text
    assert not server.engine.calls


async def test_whole_surrogate_pairs_are_characters(server: Server) -> None:
    reply = await send(
        server, "/v1/completions", r'{"prompt": "\ud83d\ude00", "echo": true, "max_tokens": 1}'
    )
    assert reply.json()["choices"][0]["text"].startswith("\U0001f600")


@pytest.mark.parametrize("path", BODY_ROUTES)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"NaN",
        b'"x"',
        b"5",
        b'{"a": NaN}',
        b'{"prompt": Infinity}',
        b'{"prompt": 1e999}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "a" "b"}',
        b'{"prompt": "\\x"}',
        b"[" * 100_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        b'{"prompt": ' + b"9" * 10_000 + b"}",
        b'{"max_tokens": 9%s, "prompt": 1, "inputs": 9%s, "parameters": {}}' % (b"9" * 4_200, b"9" * 4_200),
        "{}".encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b"\x00",
    ],
    ids=lambda content: ascii(content[:20]),
)
async def test_what_is_no_usable_json_is_the_clients_fault(server: Server, path: str, content: bytes) -> None:
    reply = await send(server, path, content)
    assert reply.status_code in (400, 422)
    assert len(reply.content) < 2 * MAX_MESSAGE_CHARS
    assert not server.engine.calls


BIG = (2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63) - 1, -(10**30))
COUNTS = ("max_tokens", "min_tokens", "n", "best_of", "top_k", "seed", "logprobs")


@pytest.mark.parametrize("value", BIG)
@pytest.mark.parametrize("name", COUNTS)
async def test_integers_of_completions_have_bounds(server: Server, name: str, value: int) -> None:
    if name == "seed" and -(2**63) <= value < 2**63:
        return
    reply = await server.complete(**{name: value})
    assert (reply.status_code, name in reply.text) == (400, True)
    assert not server.engine.calls


@pytest.mark.parametrize("value", BIG)
@pytest.mark.parametrize(
    "name", ["max_new_tokens", "top_k", "seed", "best_of", "truncate", "return_k_alternatives"]
)
async def test_integers_of_lorax_have_bounds(server: Server, name: str, value: int) -> None:
    if name == "seed" and -(2**63) <= value < 2**63:
        return
    parameters = {name: value, "details": True}
    assert (await server.post("/generate", inputs="x", parameters=parameters)).status_code == 422


@pytest.mark.parametrize("value", BIG)
async def test_integers_of_lightllm_have_bounds(server: Server, value: int) -> None:
    for name in ("max_new_tokens", "top_k"):
        reply = await server.post("/generate", inputs="x", parameters={name: value}, lora_dir=None)
        assert reply.status_code == 400
    assert (await server.post("/generate", inputs="x", parameters={}, lora_id=value)).status_code in (
        400,
        404,
    )


@pytest.mark.parametrize("value", [10**400, -(10**400), "1", True, None, [], {}])
@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
)
async def test_no_number_is_a_server_error(server: Server, name: str, value: object) -> None:
    assert (await server.complete(**{name: value})).status_code in (200, 400)


@pytest.mark.parametrize("value", [0, 1e-38, 0.009, 100.1])
async def test_a_repetition_penalty_that_would_overflow_is_refused(server: Server, value: float) -> None:
    reply = await server.complete(repetition_penalty=value)
    assert (reply.status_code, "repetition_penalty" in reply.text) == (400, True)
    assert not server.engine.calls


async def test_choices_of_the_largest_seed_have_seeds_too(server: Server) -> None:
    assert (await server.complete(n=3, seed=2**63 - 1)).status_code == 200
    seeds = {call.sampling.seed for call in server.engine.calls}
    assert seeds == {2**63 - 1, -(2**63), -(2**63) + 1}


@pytest.mark.parametrize(
    ("stop", "named"),
    [
        (["x"] * 65, "65 strings"),
        (["x" * 1025], "1025 characters"),
        ([f"zz{i}" for i in range(10_000)], "10000"),
    ],
)
async def test_stop_strings_are_bounded(server: Server, stop: list[str], named: str) -> None:
    reply = await server.complete(stop=stop)
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]


async def test_the_most_stop_strings_are_served(server: Server) -> None:
    stop = [chr(0x4E00 + i) * 1024 for i in range(64)]
    assert (await server.complete(stop=stop)).status_code == 200


async def test_many_token_ids_to_stop_at_are_refused(server: Server) -> None:
    assert "1025 ids" in (await server.complete(stop_token_ids=[5] * 1025)).text


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": [' + b"1," * MAX_ITEMS + b"1]}",
        b'{"prompt": [' + b'"",' * MAX_TEXTS + b'""]}',
        b'{"metadata": {' + b",".join(b'"%d":1' % i for i in range(MAX_TEXTS)) + b'}, "prompt": "x"}',
    ],
    ids=["numbers", "strings", "fields"],
)
async def test_bodies_of_too_many_values_are_refused_before_they_are_read(
    server: Server, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msgspec.json.decode", None)
    with pytest.raises(ApiError, match="at most"):
        parse(content)


async def test_marks_inside_of_strings_are_no_values() -> None:
    text = '[{",\\' * MAX_TEXTS
    assert parse(json.dumps({"prompt": text}).encode()) == {"prompt": text}


@pytest.mark.parametrize("depth", [32, 33])
async def test_depth_is_bounded(depth: int) -> None:
    content = b"[" * depth + b"]" * depth
    if depth == 32:
        parse(content)
    else:
        with pytest.raises(ApiError, match="deep"):
            parse(content)


@pytest.mark.parametrize(
    "field",
    [
        {"prompt": [0.5] * 50_000},
        {"prompt": ["x"] * 5_000 + [1]},
        {"prompt": "x", "stop": [0.5] * 50_000},
        {"prompt": 1, **{f"odd{i}": 1 for i in range(5_000)}},
        {"prompt": "x", "model": "m" * 100_000},
        {"prompt": 1, "m" * 100_000: 1},
        {"prompt": "x", "suffix": "m" * 100_000},
        {"prompt": "x" * 100_000},
        {"prompt": ["x"] * 300},
    ],
    ids=lambda field: ",".join(field)[:40],
)
async def test_an_error_does_not_echo_what_was_sent(server: Server, field: dict[str, object]) -> None:
    reply = await server.post("/v1/completions", **field)
    assert reply.status_code == 400
    assert len(reply.content) < 2 * MAX_MESSAGE_CHARS


async def test_a_long_text_is_refused_before_it_is_tokenised(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A character has at least a hundredth of a token here; what may still fit is counted in slices."""
    seen: list[int] = []
    tokenizer = server.state.text._tokenizer
    encode = tokenizer.encode

    def seen_encode(text: str, **options: bool) -> list[int]:
        seen.append(len(text))
        found: list[int] = encode(text, **options)
        return found

    monkeypatch.setattr(tokenizer, "encode", seen_encode)
    monkeypatch.setattr(server.state.text, "_max_token_chars", 1 << 20)
    for body in ({"prompt": "x" * 500_000}, {"prompt": ["x", "y" * 500_000]}):
        reply = await server.complete(**body)
        assert (reply.status_code, "context length is 128 tokens" in reply.text) == (400, True), reply.text[
            :600
        ]
    message = {"role": "user", "content": "x" * 500_000}
    assert (await server.post("/v1/chat/completions", messages=[message])).status_code == 400
    assert max(seen) == 1 << 16
    monkeypatch.undo()
    assert (await server.complete("x" * 500_000)).status_code == 400
    assert sum(seen) < 500_000


async def test_a_full_queue_is_told_before_anything_is_tokenised(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.engine.num_pending = 256
    monkeypatch.setattr(server.state.text, "encode", None)
    message = {"role": "user", "content": "x"}
    assert (await server.complete("x" * 50_000)).status_code == 429
    assert (await server.post("/v1/chat/completions", messages=[message])).status_code == 429
    assert (await server.post("/generate", inputs="x", parameters={})).status_code == 429


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x", "model": "nope"}),
        ("/v1/completions", {"prompt": "x", "temperature": -1}),
        ("/v1/completions", {"prompt": "x" * 5_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "model": "nope"}),
        ("/generate", {"inputs": "x", "parameters": {"adapter_id": "nope"}}),
        ("/generate", {"inputs": "x", "parameters": {}, "lora_dir": "nope"}),
    ],
)
async def test_a_refused_request_leaves_its_place(server: Server, path: str, body: dict[str, object]) -> None:
    assert (await server.post(path, **body)).status_code >= 400
    assert server.state.num_open == 0


class TestBodies:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"max_body_bytes": 300, "receive_timeout_s": PATIENCE_S}

    @pytest.mark.parametrize("path", BODY_ROUTES)
    async def test_a_body_beyond_the_limit_is_413(self, server: Server, path: str) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b"x" * 40

        for content in (b"x" * 301, chunks()):
            assert (await server.http.post(path, content=content, headers=JSON)).status_code == 413

    async def test_unfinished_bodies_share_a_bound(self, server: Server) -> None:
        has_ended = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b" " * 290
            await has_ended.wait()

        waiting = [
            asyncio.create_task(server.http.post("/v1/completions", content=slow(), headers=JSON))
            for _ in range(9)
        ]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result().status_code for task in waiting if task.done()] == [503]
        has_ended.set()
        await asyncio.gather(*waiting)
        assert (await server.complete("hi")).status_code == 200


class TestWhatHasToComeSoon:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"receive_timeout_s": 0.05}

    @pytest.mark.parametrize("path", BODY_ROUTES)
    async def test_a_body_that_stalls_is_408(self, server: Server, path: str) -> None:
        async def stalling() -> AsyncIterator[bytes]:
            yield b'{"prompt": '
            await asyncio.Event().wait()

        reply = await server.http.post(path, content=stalling(), headers=JSON)
        assert (reply.status_code, reply.headers["connection"]) == (408, "close")

    async def test_a_body_that_trickles_is_cut_as_well(self, server: Server) -> None:
        async def trickling() -> AsyncIterator[bytes]:
            while True:
                yield b" "
                await asyncio.sleep(0.01)

        reply = await server.http.post("/v1/completions", content=trickling(), headers=JSON)
        assert reply.status_code == 408


def test_the_limit_of_a_body_follows_the_models_context() -> None:
    assert (body_limit(0, 2048), body_limit(0, 1 << 17), body_limit(5, 1 << 17)) == (4 << 20, 8 << 20, 5)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/models/%ff", 400),
        ("/v1/models/%ed%a0%80", 400),
        ("/v1/models/a%00b", 400),
        ("/v1/models?x=%ff", 400),
        ("/v1/models/" + "x" * 20_000, 414),
        ("/v1/models?" + "x" * 20_000, 414),
        ("/v1/models/" + "x" * 10_000, 404),
        ("/v1/models/%zz", 404),
        ("/%f0%9f%98%80", 404),
    ],
    ids=lambda path: str(path)[:24],
)
async def test_urls_are_bounded_text(server: Server, path: str, status: int) -> None:
    reply = await server.http.get(path)
    assert reply.status_code == status
    assert len(reply.content) < 2 * MAX_MESSAGE_CHARS


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "identity"}, 200),
        ({"x-long": "x" * 70_000}, 431),
        ({"x-odd": "\xff\xfe"}, 200),
    ],
    ids=["gzip", "identity", "long", "odd"],
)
async def test_headers_are_bounded(server: Server, headers: dict[str, str], status: int) -> None:
    encoded = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    reply = await server.http.post("/v1/completions", json={"prompt": "hi"}, headers=encoded)
    assert reply.status_code == status


@pytest.mark.parametrize(("code", "status"), [(28, 507), (122, 507), (24, 503), (12, 503), (13, 500)])
def test_a_lack_of_the_servers_is_no_fault_of_the_request(code: int, status: int) -> None:
    wrapped = RuntimeError("could not write")
    wrapped.__cause__ = OSError(code, "why", "/somewhere")
    assert [describe(error).status for error in (OSError(code, "why"), wrapped)] == [status] * 2
