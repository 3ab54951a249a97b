"""The openai package, unchanged, against the server on a loopback port."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import openai
import pytest

from tests.server.conftest import Server


@pytest.fixture
async def client(server: Server, url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    server.registry.register("a", server.state.config.server.adapters + "/adapter-00000")
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


async def test_completions(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model="a", prompt="hello", max_tokens=5, n=2, logprobs=1)
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 10
    assert reply.choices[0].logprobs is not None


async def test_streamed_completions(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model="a", prompt="hello", max_tokens=9)
    stream = await client.completions.create(model="a", prompt="hello", max_tokens=9, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == whole.choices[0].text


async def test_chat(client: openai.AsyncOpenAI) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
    reply = await client.chat.completions.create(
        model="base", messages=messages, max_completion_tokens=4, logprobs=True, top_logprobs=2
    )
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content
    assert content is not None
    assert [len(token.top_logprobs) for token in content] == [2] * 4


async def test_streamed_chat_with_usage(client: openai.AsyncOpenAI) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
    stream = await client.chat.completions.create(
        model="a", messages=messages, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["base", "a"]
    assert (await client.models.retrieve("a")).id == "a"


async def test_errors_have_their_classes(server: Server, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await client.completions.create(model="nope", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.completions.create(model="base", prompt="x", temperature=-1)
    server.engine.error = "it broke"
    with pytest.raises(openai.InternalServerError, match="it broke"):
        await client.completions.create(model="base", prompt="x")


async def test_a_full_queue_is_a_rate_limit(server: Server, client: openai.AsyncOpenAI) -> None:
    server.engine.num_pending = 256
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model="base", prompt="x")


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("num_tokens_before", [0, 3])
async def test_a_client_that_leaves_ends_its_requests(
    server: Server, url: str, is_streamed: bool, num_tokens_before: int
) -> None:
    engine = server.engine
    engine.delay_s = 0.005
    if num_tokens_before == 0:
        engine.gate.clear()
    body = {"prompt": "hello", "max_tokens": 100, "n": 2, "stream": is_streamed}
    async with httpx.AsyncClient(timeout=None) as http:
        reading = asyncio.create_task(http.post(f"{url}/v1/completions", json=body))
        while len(engine.calls) < 2 or min(call.num_sent for call in engine.calls) < num_tokens_before:
            await asyncio.sleep(0.001)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    while not all(call.was_aborted for call in engine.calls):
        await asyncio.sleep(0.001)
    while server.state.num_open:
        await asyncio.sleep(0.001)
    assert server.state.num_waiting == 0


@pytest.mark.parametrize("selector", [{"lora_dir": "a"}, {}])
async def test_a_client_that_leaves_generate_ends_its_request(
    server: Server, client: openai.AsyncOpenAI, url: str, selector: dict[str, str]
) -> None:
    server.engine.gate.clear()
    body = {"inputs": "hello", "parameters": {}, **selector}
    async with httpx.AsyncClient(timeout=None) as http:
        reading = asyncio.create_task(http.post(f"{url}/generate", json=body))
        while not server.engine.calls:
            await asyncio.sleep(0.001)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    while not server.engine.calls[0].was_aborted:
        await asyncio.sleep(0.001)
