"""`/v1/messages` with Anthropic's own client against the server on a loopback port, and by hand."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.fakes import FakeEngineClient
from tests.server.conftest import CALL, Server, roomy_engine, says

if TYPE_CHECKING:  # its import takes seconds: not while tests are collected, which every process does
    import anthropic
    from anthropic.types import MessageParam, ToolParam

USER: MessageParam = {"role": "user", "content": "hi"}
BODY: dict[str, Any] = {"model": "base", "max_tokens": 4, "messages": [USER]}
WEATHER: ToolParam = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture
async def engine() -> FakeEngineClient:
    return roomy_engine()


@pytest.fixture
async def client(url: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    import anthropic

    async with anthropic.AsyncAnthropic(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


async def test_a_message(server: Server, client: anthropic.AsyncAnthropic) -> None:
    says(server, "hello")
    reply = await client.messages.create(model="base", max_tokens=50, messages=[USER], system="You answer.")
    [block] = reply.content
    assert block.type == "text"
    assert block.text == "hello"
    assert (reply.role, reply.model, reply.stop_reason) == ("assistant", "base", "end_turn")
    prompt = server.engine.calls[0].prompt_token_ids
    num_tokens = len(server.state.text.encode("hello", add_special_tokens=False)) + 1  # and the end token
    chat = [{"role": "system", "content": "You answer."}, {"role": "user", "content": "hi"}]
    assert prompt == server.state.text.chat(chat)
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (len(prompt), num_tokens)
    assert reply._request_id


async def test_a_stream_says_the_same(server: Server, client: anthropic.AsyncAnthropic) -> None:
    says(server, "hello there, you")
    whole = await client.messages.create(model="base", max_tokens=50, messages=[USER])
    async with client.messages.stream(model="base", max_tokens=50, messages=[USER]) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == "hello there, you"
    assert [block.to_dict() for block in final.content] == [block.to_dict() for block in whole.content]
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


async def test_events_come_in_order(server: Server) -> None:
    says(server, "a" + CALL)
    reply = await server.post("/v1/messages", **{**BODY, "max_tokens": 90}, tools=[WEATHER], stream=True)
    pairs = [each.split("\n") for each in reply.text.strip().split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name.removeprefix("event: ") for name, _ in pairs] == [event["type"] for event in events]
    kinds = [event["type"] for event in events if event["type"] != "content_block_delta"]
    block = ["content_block_start", "content_block_stop"]
    assert kinds == ["message_start", *block, *block, "message_delta", "message_stop"]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    arguments = "".join(each.get("delta", {}).get("partial_json", "") for each in events)
    assert json.loads(arguments) == {"city": "Oslo"}


async def test_tools(server: Server, client: anthropic.AsyncAnthropic) -> None:
    says(server, CALL)
    options: dict[str, Any] = {"model": "base", "max_tokens": 90, "tools": [WEATHER]}
    reply = await client.messages.create(messages=[USER], **options)
    [block] = reply.content
    assert block.type == "tool_use"
    assert (block.name, block.input, reply.stop_reason) == ("weather", {"city": "Oslo"}, "tool_use")
    async with client.messages.stream(messages=[USER], **options) as stream:
        final = await stream.get_final_message()
    assert [(b.name, b.input) for b in final.content if b.type == "tool_use"] == [
        ("weather", {"city": "Oslo"})
    ]
    says(server, "cold")
    result: MessageParam = {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "-3 C"}]},
            {"type": "text", "text": "well?"},
        ],
    }
    turns: list[MessageParam] = [USER, {"role": "assistant", "content": reply.content}, result]
    after = await client.messages.create(messages=turns, **options)
    assert [b.text for b in after.content if b.type == "text"] == ["cold"]
    shown = server.state.text.decode(server.engine.calls[-1].prompt_token_ids)
    assert shown.index("Oslo") < shown.index("-3 C") < shown.index("well?")


async def test_tokens_are_counted_as_they_are_charged(
    server: Server, client: anthropic.AsyncAnthropic
) -> None:
    counted = await client.messages.count_tokens(model="base", messages=[USER], system="s", tools=[WEATHER])
    reply = await client.messages.create(
        model="base", max_tokens=1, messages=[USER], system="s", tools=[WEATHER]
    )
    assert counted.input_tokens == reply.usage.input_tokens
    assert len(server.engine.calls) == 1


async def test_sampling_reaches_the_engine(server: Server) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 3.0, "stop_sequences": ["x"], "seed": 7}
    assert (await server.post("/v1/messages", **BODY, **sampling)).status_code == 200
    [call] = server.engine.calls
    told = call.sampling
    assert (told.temperature, told.top_p, told.top_k, told.stop, told.seed) == (0.5, 0.9, 3, ("x",), 7)
    assert told.max_tokens == 4


async def test_how_a_message_ends(server: Server) -> None:
    reply = (await server.post("/v1/messages", **BODY)).json()
    assert (reply["stop_reason"], reply["usage"]["output_tokens"]) == ("max_tokens", 4)
    says(server, "one STOP two")
    body = {**BODY, "max_tokens": 50, "stop_sequences": ["STOP"]}
    reply = (await server.post("/v1/messages", **body)).json()
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "STOP")
    assert reply["content"][0]["text"] == "one "


async def test_an_answer_that_is_begun_goes_on(server: Server) -> None:
    begun = [USER, {"role": "assistant", "content": "I think"}]
    await server.post("/v1/messages", **{**BODY, "messages": begun})
    options: Any = {"add_generation_prompt": False, "continue_final_message": True}
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I think"}]
    assert server.engine.calls[0].prompt_token_ids == server.state.text.chat(chat, **options)


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"max_tokens": None}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 50000}, 400, "prompt is too long: This model's maximum context length"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "image"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            400,
            "tool_result",
        ),
        ({"model": "nobody"}, 404, "nobody"),
        ({"temperature": -1}, 400, "temperature"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "tools.0.type"),
        ({"tools": [{"name": "a"}]}, 400, "input_schema"),
        ({"tool_choice": {"type": "tool"}}, 400, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "a"}}, 400, "tool_choice"),
        ({"mcp_servers": [{}]}, 400, "mcp_servers"),
        ({"thinking": {"type": "sometimes"}}, 400, "thinking.type"),
    ],
)
async def test_what_cannot_be_done_is_told_in_anthropics_form(
    server: Server, body: dict[str, object], status: int, named: str
) -> None:
    reply = await server.post("/v1/messages", **{**BODY, **body})
    content = reply.json()
    assert (reply.status_code, content["type"]) == (status, "error")
    assert content["error"]["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert named in content["error"]["message"]
    assert content["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]
    assert not server.engine.calls


async def test_errors_have_their_classes(server: Server, client: anthropic.AsyncAnthropic) -> None:
    import anthropic

    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        await client.messages.create(model="nobody", max_tokens=1, messages=[USER])
    server.engine.num_pending = 256
    with pytest.raises(anthropic.RateLimitError):
        await client.messages.create(model="base", max_tokens=1, messages=[USER])


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_engine_that_gives_up_is_the_servers_fault(server: Server, is_streamed: bool) -> None:
    server.engine.error = "it broke"
    reply = await server.post("/v1/messages", **BODY, stream=is_streamed)
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "api_error")
    assert "it broke" in reply.json()["error"]["message"]


async def test_a_stream_that_is_cut_ends_with_an_error(server: Server) -> None:
    server.engine.cut.set()
    reply = await server.post("/v1/messages", **BODY, stream=True)
    name, data = reply.text.strip().split("\n\n")[-1].split("\n")
    assert (name, json.loads(data.removeprefix("data: "))["error"]["type"]) == (
        "event: error",
        "overloaded_error",
    )


async def test_marks_for_a_cache_say_nothing_and_budgets_are_told_of(server: Server) -> None:
    mark = {"type": "ephemeral"}
    system = [{"type": "text", "text": "s", "cache_control": mark}]
    thinking = {"type": "enabled", "budget_tokens": 1024}
    reply = await server.post("/v1/messages", **BODY, system=system, thinking=thinking, metadata={"a": "b"})
    assert (reply.status_code, reply.headers["x-toppings-ignored"]) == (200, "thinking.budget_tokens")


class TestWithAKey:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"api_key": "secret"}

    async def test_it_may_come_as_anthropics_clients_send_it(self, server: Server, url: str) -> None:
        import anthropic

        async with anthropic.AsyncAnthropic(base_url=url, api_key="secret", max_retries=0) as client:
            assert await client.messages.create(model="base", max_tokens=1, messages=[USER])
        async with anthropic.AsyncAnthropic(base_url=url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError, match="key"):
                await client.messages.create(model="base", max_tokens=1, messages=[USER])
        async with httpx.AsyncClient(timeout=None) as http:
            reply = await http.get(f"{url}/v1/models", headers={"X-Api-Key": "secret"})
            assert reply.status_code == 200
