"""The openai package's own ways to tools and typed answers, over an engine that says what is allowed."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import llguidance
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field

from tests.fakes import VOCAB_SIZE, FakeEngineClient, following_script
from tests.server.conftest import Server

EOS = 1
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Weather?"}]


class Weather(BaseModel):
    """The weather that is asked for."""

    city: Literal["Rome", "K\u00f6ln"]
    days: int = Field(ge=1, le=9)
    is_metric: bool | None


TOOL = openai.pydantic_function_tool(Weather)


@pytest.fixture
async def engine(model_dir: Path) -> FakeEngineClient:
    text = (model_dir / "tokenizer.json").read_text()
    vocabulary = llguidance.LLTokenizer(text, n_vocab=VOCAB_SIZE, eos_token=EOS)
    engine = FakeEngineClient(script=following_script(vocabulary, EOS))
    engine.info = replace(engine.info, max_model_len=8192)
    return engine


@pytest.fixture
async def client(server: Server, url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


async def test_a_typed_answer(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.parse(model="base", messages=MESSAGES, response_format=Weather)
    assert isinstance(reply.choices[0].message.parsed, Weather)


async def test_a_forced_call_is_parsed(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.parse(
        model="base", messages=MESSAGES, tools=[TOOL], tool_choice="required"
    )
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls
    assert calls
    assert all(isinstance(call.function.parsed_arguments, Weather) for call in calls)


async def test_a_streamed_call_is_put_together(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(
        model="base",
        messages=MESSAGES,
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "Weather"}},
    ) as stream:
        kinds = [event.type async for event in stream]
        reply = await stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 3
    assert kinds.count("tool_calls.function.arguments.done") == 1
    [call] = reply.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)


async def test_calls_and_results_go_back_and_forth(client: openai.AsyncOpenAI) -> None:
    asked = await client.chat.completions.create(
        model="base", messages=MESSAGES, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    )
    message = asked.choices[0].message
    [call] = message.tool_calls or []
    answered: list[ChatCompletionMessageParam] = [
        *MESSAGES,
        cast(ChatCompletionMessageParam, message.model_dump()),
        {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"},
    ]
    reply = await client.chat.completions.create(
        model="base", messages=answered, tools=[TOOL], tool_choice="none", max_tokens=5
    )
    assert reply.choices[0].message.content


async def test_an_answer_may_be_a_call_or_typed(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.parse(
        model="base", messages=MESSAGES, tools=[TOOL], response_format=Weather
    )
    message = reply.choices[0].message
    assert bool(message.tool_calls) != isinstance(message.parsed, Weather)
