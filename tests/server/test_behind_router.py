"""The routes of today's clients through the router, with their own packages; the server behind it is ours."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from tests.server.conftest import Server
from toppings.cluster.router.answers import BadAnswerError, StreamWatch
from toppings.cluster.router.app import running_router
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.cluster.router.stream_tokens import StreamTokens
from toppings.request_ids import REQUEST_ID

if TYPE_CHECKING:  # its import takes seconds: not while tests are collected, which every process does
    import anthropic

USER: anthropic.types.MessageParam = {"role": "user", "content": "hi"}


@pytest.fixture
async def router(server: Server, url: str) -> AsyncIterator[str]:
    server.registry.register("a", server.state.config.server.adapters + "/adapter-00000")
    config = RouterConfig(instances=(InstanceConfig(url=url, instance_id="s0"),), port=0)
    async with running_router(config) as (_, address):
        yield address


@pytest.fixture
async def http(router: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=router, timeout=None) as http:
        yield http


async def test_responses_and_messages_go_where_their_model_is(server: Server, router: str) -> None:
    import anthropic

    server.engine.script = lambda call: [70, 71, 72, 0]
    async with openai.AsyncOpenAI(base_url=f"{router}/v1", api_key="x", max_retries=0) as client:
        reply = await client.responses.create(model="a", input="hi", max_output_tokens=5)
        async with client.responses.stream(model="a", input="hi", max_output_tokens=5) as stream:
            final = await stream.get_final_response()
    assert final.output_text == reply.output_text != ""
    async with anthropic.AsyncAnthropic(base_url=router, api_key="x", max_retries=0) as other:
        message = await other.messages.create(model="a", max_tokens=5, messages=[USER])
        async with other.messages.stream(model="a", max_tokens=5, messages=[USER]) as events:
            whole = await events.get_final_message()
        counted = await other.messages.count_tokens(model="a", messages=[USER])
        with pytest.raises(anthropic.NotFoundError, match="nobody"):
            await other.messages.create(model="nobody", max_tokens=5, messages=[USER])
    assert whole.usage == message.usage
    assert counted.input_tokens == message.usage.input_tokens
    assert {call.adapter_id for call in server.engine.calls} == {server.state.target("a").adapter_id}


async def test_texts_and_tokens(server: Server, http: httpx.AsyncClient) -> None:
    ids = (await http.post("/tokenize", json={"model": "a", "prompt": "hello"})).json()["tokens"]
    assert ids == server.state.text.encode("hello")
    back = await http.post("/detokenize", json={"model": "a", "tokens": ids})
    assert back.json() == {"prompt": server.state.text.decode(ids, skip_special_tokens=False)}


async def test_an_id_goes_all_the_way(http: httpx.AsyncClient) -> None:
    for path in ("/v1/completions", "/v1/messages", "/nowhere", "/health"):
        reply = await http.post(path, json={"prompt": "x", "max_tokens": 1}, headers={REQUEST_ID: "mine"})
        assert reply.headers.get_list(REQUEST_ID) == ["mine"]
    made = [(await http.post("/v1/completions", json={"prompt": "x"})).headers[REQUEST_ID] for _ in range(2)]
    assert made[0] != made[1]


async def test_small_routes_and_methods(http: httpx.AsyncClient) -> None:
    assert [(await http.request(m, "/ping")).status_code for m in ("GET", "POST", "HEAD")] == [200] * 3
    assert (await http.get("/version")).json()["version"]
    assert (await http.head("/v1/models")).content == b""
    options = await http.options("/v1/responses")
    assert (options.status_code, options.headers["allow"]) == (204, "POST")


async def test_errors_of_the_router_are_in_the_routes_dialect(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/messages", content=b"{")
    assert (reply.status_code, reply.json()["type"]) == (400, "error")
    assert reply.json()["error"]["type"] == "invalid_request_error"
    reply = await http.post("/v1/responses", content=b"{")
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, 400)


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


BEGUN = event("message_start") + event("content_block_delta", text="event: message_stop\n")


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
@pytest.mark.parametrize(
    ("path", "content", "is_whole"),
    [
        ("/v1/messages", BEGUN + event("message_stop"), True),
        ("/v1/messages", BEGUN + event("error"), True),
        ("/v1/messages", BEGUN, False),
        ("/v1/messages", event("message_stop") + BEGUN, False),
        ("/v1/responses", event("response.created") + event("response.completed", long="x" * 500), True),
        ("/v1/responses", event("response.created") + event("response.incomplete"), True),
        ("/v1/responses", event("response.created") + event("response.output_text.delta"), False),
        ("/v1/responses", event("response.completed.not"), False),
    ],
)
def test_the_end_of_a_stream_is_known_by_its_last_event(
    path: str, content: bytes, is_whole: bool, size: int
) -> None:
    watch = StreamWatch(path, 200)
    for start in range(0, len(content), size):
        watch.note(content[start : start + size])
    if is_whole:
        watch.check_end()
    else:
        with pytest.raises(BadAnswerError, match="without its last event"):
            watch.check_end()


def test_only_what_says_more_of_an_answer_counts() -> None:
    assert StreamTokens("/v1/messages").note(BEGUN + event("message_stop")) == 1
    assert (
        StreamTokens("/v1/responses").note(event("response.created") + event("response.output_text.delta"))
        == 1
    )
    assert StreamTokens("/v1/completions").note(b"data: {}\n\ndata: {}\n\n") == 2
