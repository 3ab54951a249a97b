"""`/v1/responses` with the openai package, unchanged, against the server on a loopback port, and by hand."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.fakes import FakeEngineClient
from tests.server.conftest import CALL, Server, roomy_engine, says
from toppings.server.responses_body import ResponsesBody

BODY: dict[str, Any] = {"model": "base", "max_output_tokens": 4, "input": "hi"}
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture
async def engine() -> FakeEngineClient:
    return roomy_engine()


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


async def test_a_response(server: Server, client: openai.AsyncOpenAI) -> None:
    says(server, "hello")
    reply = await client.responses.create(model="base", input="hi", instructions="You answer.", store=True)
    assert (reply.output_text, reply.status, reply.to_dict()["store"]) == ("hello", "completed", False)
    chat = [{"role": "system", "content": "You answer."}, {"role": "user", "content": "hi"}]
    prompt = server.engine.calls[0].prompt_token_ids
    assert prompt == server.state.text.chat(chat)
    assert reply.usage is not None
    num_tokens = len(server.state.text.encode("hello", add_special_tokens=False)) + 1  # and the end token
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (len(prompt), num_tokens)


async def test_a_stream_says_the_same(server: Server, client: openai.AsyncOpenAI) -> None:
    says(server, "hello there, you")
    whole = await client.responses.create(model="base", input="hi")
    async with client.responses.stream(model="base", input="hi") as stream:
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        final = await stream.get_final_response()
    assert text == final.output_text == whole.output_text == "hello there, you"
    assert final.usage == whole.usage


async def test_events_are_numbered_and_nested(server: Server) -> None:
    says(server, "a" + CALL)
    body = {**BODY, "max_output_tokens": 90, "tools": [WEATHER], "stream": True}
    reply = await server.post("/v1/responses", **body)
    pairs = [each.split("\n") for each in reply.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name.removeprefix("event: ") for name, _ in pairs] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [e["type"].removeprefix("response.") for e in events if not e["type"].endswith(".delta")]
    assert kinds == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "output_text.done"),
        *("content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    assert [item["type"] for item in done] == ["message", "function_call"]


async def test_tools(server: Server, client: openai.AsyncOpenAI) -> None:
    says(server, CALL)
    reply = await client.responses.create(model="base", input="hi", tools=[WEATHER])
    [item] = reply.output
    assert item.type == "function_call"
    assert (item.name, json.loads(item.arguments)) == ("weather", {"city": "Oslo"})
    async with client.responses.stream(model="base", input="hi", tools=[WEATHER]) as stream:
        final = await stream.get_final_response()
    assert [i.name for i in final.output if i.type == "function_call"] == ["weather"]
    says(server, "cold")
    turns: Any = [
        {"role": "user", "content": "hi"},
        *(each.model_dump(exclude_none=True) for each in reply.output),
        {"type": "function_call_output", "call_id": item.call_id, "output": "-3 C"},
    ]
    after = await client.responses.create(model="base", input=turns, tools=[WEATHER])
    assert after.output_text == "cold"
    shown = server.state.text.decode(server.engine.calls[-1].prompt_token_ids)
    assert shown.index("Oslo") < shown.index("-3 C")


def test_items_of_one_turn_are_one_message() -> None:
    part = [{"type": "output_text", "text": "b", "annotations": []}]
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "s"}]},
        {"role": "user", "content": "a"},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "t"}],
        },
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": part},
        {**call, "call_id": "1"},
        {**call, "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "one"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "two"}]},
        {**call, "call_id": "3"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "u"}]},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    tools = [{"type": "function", "name": "f"}]
    chat = ResponsesBody.model_validate({"input": items, "tools": tools}).chat()
    seen = [(m.role, m.text, m.reasoning_content, [c.id for c in m.tool_calls or []]) for m in chat.messages]
    assert seen == [
        ("developer", "s", None, []),
        ("user", "a", None, []),
        ("assistant", "b", "t", ["1", "2"]),
        ("tool", "one", None, []),
        ("tool", "two", None, []),
        ("assistant", "", None, ["3"]),
        ("assistant", "c", "u", []),
        ("assistant", "d", None, []),
        ("user", "e", None, []),
    ]


def test_all_thoughts_of_a_turn_are_kept() -> None:
    thoughts = [{"type": "reasoning", "summary": [{"type": "summary_text", "text": text}]} for text in "ab"]
    said = {"role": "assistant", "content": "c"}
    for items in ([*thoughts, said], [thoughts[0], said, thoughts[1]]):
        [message] = ResponsesBody.model_validate({"input": items}).chat().messages
        assert (message.text, message.reasoning_content) == ("c", "a\n\nb")


async def test_an_answer_that_is_cut_is_incomplete(server: Server, client: openai.AsyncOpenAI) -> None:
    reply = await client.responses.create(model="base", input="hi", max_output_tokens=4)
    assert reply.status == "incomplete"
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    async with client.responses.stream(model="base", input="hi", max_output_tokens=4) as stream:
        last = [event async for event in stream][-1]
    assert last.type == "response.incomplete"
    assert last.response.output_text == reply.output_text


async def test_sampling_reaches_the_engine(server: Server) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 3.0, "stop": "x", "seed": 7, "cache_salt": "s"}
    sampling["text"] = {"verbosity": "medium"}  # the default
    reply = await server.post("/v1/responses", **BODY, **sampling)
    told = server.engine.calls[0].sampling
    assert (told.temperature, told.top_p, told.top_k, told.stop, told.seed) == (0.5, 0.9, 3, ("x",), 7)
    assert (told.max_tokens, reply.json()["temperature"]) == (4, 0.5)


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"input": None}, 400, "body.input"),
        ({"input": []}, 400, "body.input"),
        ({"text": {"verbosity": "low"}}, 400, "verbosity"),
        ({"input": [{"role": "pope", "content": "x"}]}, 400, "role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input_image"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"max_output_tokens": 50_000}, 400, "maximum context length"),
        ({"model": "nobody"}, 404, "nobody"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ({"conversation": "conv_1"}, 400, "conversation"),
        ({"background": True}, 400, "background"),
        ({"truncation": "auto"}, 400, "truncation"),
        ({"include": ["web_search_call.results"]}, 400, "include"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools.0.type"),
        ({"tool_choice": {"type": "web_search"}}, 400, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, 400, "tool_choice"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": []}},
            400,
            "tool_choice allows no tools",
        ),
        ({"temperature": -1}, 400, "temperature"),
        ({"stream_options": {"include_obfuscation": False}}, 400, "stream_options"),
        ({"reasoning": {"effort": "much"}}, 400, "reasoning.effort"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    server: Server, body: dict[str, object], status: int, named: str
) -> None:
    reply = await server.post("/v1/responses", **{**BODY, **body})
    assert (reply.status_code, named in reply.json()["error"]["message"]) == (status, True)
    assert not server.engine.calls


async def test_fields_that_ask_for_nothing_are_taken(server: Server) -> None:
    neutral = {
        "store": True,
        "include": ["reasoning.encrypted_content"],
        "truncation": "disabled",
        "user": "u",
    }
    reply = await server.post("/v1/responses", **BODY, **neutral, metadata={"a": "b"}, top_logprobs=0)
    assert reply.status_code == 200
    assert (reply.json()["metadata"], reply.json()["store"]) == ({"a": "b"}, False)
    assert "x-toppings-ignored" not in reply.headers


@pytest.mark.parametrize("name", ["summary", "generate_summary"])
async def test_a_summary_that_is_not_made_is_told_of_as_ignored(server: Server, name: str) -> None:
    reply = await server.post("/v1/responses", **BODY, reasoning={name: "auto"})
    assert (reply.status_code, reply.headers["x-toppings-ignored"]) == (200, f"reasoning.{name}")
    reply = await server.post("/v1/responses", **BODY, reasoning={name: None})
    assert (reply.status_code, reply.headers.get("x-toppings-ignored")) == (200, None)


async def test_a_stream_that_is_cut_ends_with_an_error(server: Server, client: openai.AsyncOpenAI) -> None:
    server.engine.cut.set()
    stream = await client.responses.create(model="base", input="hi", stream=True)
    with pytest.raises(openai.APIError, match="shutting down"):
        async for _ in stream:
            pass
