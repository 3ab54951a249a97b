"""Chats with tools, thoughts and what templates are told, over an engine that says what a test wants."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import Call, FakeEngineClient
from tests.server.conftest import Server, events
from tests.tools.stand_ins import FAMILIES, QWEN
from toppings.sampling_params import StructureKind
from toppings.text import TextModel

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Weather?"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "time", "description": "Tells it", "strict": False}}
TOOLS = [WEATHER, TIME]


def allowed(mode: str) -> dict[str, object]:
    """No tools at all."""
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": []}}


ARGUMENTS = '{"city": "Köln"}'
WRITTEN = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "llama3_json": f'{{"name": "weather", "parameters": {ARGUMENTS}}}',
    "mistral": f'[TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}}}]',
    "mistral_named": f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}",
    "generic": f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
}


@pytest.fixture
async def engine() -> FakeEngineClient:
    engine = FakeEngineClient()
    engine.info = replace(engine.info, max_model_len=8192)
    return engine


def make_adapter(server: Server, tmp_path: Path, name: str, template: str) -> None:
    source = Path(server.state.config.server.adapters) / "adapter-00000"
    shutil.copytree(source, tmp_path / name)
    (tmp_path / name / "chat_template.jinja").write_text(template)
    server.registry.register(name, tmp_path / name)


def says(server: Server, text: str) -> None:
    """The engine's next answers; their last token is one that is not shown, as an end of a sequence is."""

    def script(_: Call) -> list[int]:
        return [*server.state.text.encode(text, add_special_tokens=False), 0]

    server.engine.script = script


async def ask(server: Server, **body: Any) -> dict[str, Any]:
    reply = await server.post("/v1/chat/completions", **{"messages": CHAT, **body})
    assert reply.status_code == 200, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


async def refusal(server: Server, **body: Any) -> str:
    reply = await server.post("/v1/chat/completions", **{"messages": CHAT, **body})
    assert reply.status_code == 400, reply.text
    message: str = reply.json()["error"]["message"]
    return message


def prompt_of(server: Server) -> str:
    return server.state.text.decode(server.engine.calls[-1].prompt_token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
async def test_calls_of_each_family_are_told_as_openai_tells_them(
    server: Server, tmp_path: Path, family: str
) -> None:
    make_adapter(server, tmp_path, "own", FAMILIES[family])
    says(server, WRITTEN[family])
    choice = await ask(server, model="own", tools=TOOLS)
    [call] = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": ARGUMENTS}
    assert len(call["id"]) >= 9
    assert '"name": "time"' in prompt_of(server)

    body = {"model": "own", "messages": CHAT, "tools": TOOLS, "stream": True}
    chunks = events(await server.post("/v1/chat/completions", **body))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", [])]
    assert deltas[0]["role"] == "assistant"
    assert pieces[0]["function"]["name"] == "weather"
    assert pieces[0]["id"]
    assert len(pieces) > 3
    assert all(set(piece) == {"index", "function"} for piece in pieces[1:])
    assert "".join(piece["function"]["arguments"] for piece in pieces) == ARGUMENTS
    assert not any(delta.get("content") for delta in deltas)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_turn_of_calls_and_results_can_be_sent_back(server: Server, tmp_path: Path) -> None:
    for family, template in FAMILIES.items():
        make_adapter(server, tmp_path, family, template)
        says(server, WRITTEN[family])
        message = (await ask(server, model=family, tools=TOOLS))["message"]
        says(server, "Fine.")
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "21 degrees"}
        choice = await ask(server, model=family, tools=TOOLS, messages=[*CHAT, message, result])
        assert choice["message"]["content"] == "Fine."
        assert choice["finish_reason"] == "stop"
        prompt = prompt_of(server)
        assert prompt.index("Weather?") < prompt.index("K\u00f6ln") < prompt.index("21 degrees")


async def test_text_before_a_call_is_content_and_several_calls_are_told(server: Server) -> None:
    says(server, f"I will look.\n{WRITTEN['generic']}\n{WRITTEN['generic']}")
    message = (await ask(server, tools=TOOLS))["message"]
    assert message["content"] == "I will look."
    assert len({call["id"] for call in message["tool_calls"]}) == 2


async def test_parallel_calls_can_be_switched_off_and_the_engine_stops_then(server: Server) -> None:
    says(server, f"{WRITTEN['generic']}\n{WRITTEN['generic']}{'x' * 500}")
    choice = await ask(server, tools=TOOLS, parallel_tool_calls=False)
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"
    assert server.engine.calls[-1].was_aborted


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("", "{}"),
        ('{"a": "K\u00f6ln"}', '{"a": "K\u00f6ln"}'),
        ("[1]", '"[1]"'),
        ("no JSON", '"no JSON"'),
        ('{"a":' * 900 + "1" + "}" * 900, '"{'),
    ],
)
async def test_earlier_arguments_of_any_kind_reach_the_template(
    server: Server, tmp_path: Path, arguments: str, shown: str
) -> None:
    make_adapter(server, tmp_path, "own", QWEN)
    says(server, "x")
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    await ask(server, model="own", messages=[*CHAT, {"role": "assistant", "tool_calls": [call]}, *CHAT])
    assert f'"arguments": {shown}' in prompt_of(server)


async def test_malformed_calls_are_content(server: Server) -> None:
    text = '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>'
    says(server, text)
    choice = await ask(server, tools=TOOLS)
    assert choice["message"]["content"] == text
    assert choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]


async def test_without_tools_such_text_is_content(server: Server) -> None:
    bodies: tuple[dict[str, Any], ...] = ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []})
    for body in bodies:
        says(server, WRITTEN["generic"])
        assert (await ask(server, **body))["message"]["content"] == WRITTEN["generic"]
        assert "weather" not in prompt_of(server)


async def test_a_call_that_was_cut_ends_for_its_length(server: Server) -> None:
    says(server, WRITTEN["generic"])
    choice = await ask(server, tools=TOOLS, max_tokens=40)
    assert choice["finish_reason"] == "length"


class TestForced:
    @pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
    async def test_calls_are_forced_by_a_grammar(self, server: Server, choice: object) -> None:
        says(server, WRITTEN["generic"])
        assert (await ask(server, tools=TOOLS, tool_choice=choice))["message"]["tool_calls"]
        structure = server.engine.calls[-1].sampling.structure
        assert structure is not None
        assert structure.kind == StructureKind.GRAMMAR
        assert ("time" in structure.text) == (choice == "required")
        assert ("call (" in structure.text) == (choice == "required")  # one that is named is called once

    async def test_strict_tools_are_held_to_their_schemas(self, server: Server) -> None:
        strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
        says(server, "x")
        await ask(server, tools=[TIME, strict])
        structure = server.engine.calls[-1].sampling.structure
        assert structure is not None
        assert json.dumps(CITY)[:-1] in structure.text
        await ask(server, tools=TOOLS)
        assert server.engine.calls[-1].sampling.structure is None

    async def test_some_of_the_tools_may_be_allowed(self, server: Server) -> None:
        names = [{"type": "function", "function": {"name": "time"}}]
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": names}}
        says(server, "x")
        await ask(server, tools=TOOLS, tool_choice=choice)
        structure = server.engine.calls[-1].sampling.structure
        assert structure is not None
        assert "weather" not in structure.text + prompt_of(server)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "'f'"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("required")}, "tool_choice allows no tools"),
        ({"tools": TOOLS, "tool_choice": allowed("auto")}, "tool_choice allows no tools"),
        ({"tools": [WEATHER, WEATHER]}, "'weather' twice"),
        ({"tools": [{"type": "web_search"}]}, "body.tools.0"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "body.tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "parameters"),
        ({"tools": [WEATHER] * 1025}, "body.tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"messages": [{"role": "tool"}]}, "content is needed"),
        ({"messages": [{"role": "user", "content": "", "tool_calls": [{"function": {}}]}]}, "tool_calls"),
        ({"messages": [{**CHAT[0], "tool_call_id": "x"}]}, "tool_call_id belongs"),
        ({"documents": [{"text": "x"}]}, "documents were given"),
        ({"documents": [{"text": 3}]}, "documents"),
        ({"chat_template": "x"}, "trust_request_chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "'messages', which is a field"),
        ({"chat_template_kwargs": {"a b": 1}}, "'a b', which is no name"),
        ({"chat_template_kwargs": {f"a{i}": 1 for i in range(65)}}, "65 values"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ],
)
async def test_bad_values_are_refused_by_name(server: Server, body: dict[str, Any], named: str) -> None:
    assert named in await refusal(server, **body)


class TestThoughts:
    @pytest.fixture(autouse=True)
    def own(self, server: Server, tmp_path: Path) -> None:
        make_adapter(server, tmp_path, "own", QWEN)

    async def test_they_are_told_apart(self, server: Server) -> None:
        says(server, "<think>\nHm.\n</think>\n\nYes.")
        message = (await ask(server, model="own"))["message"]
        assert (message["content"], message["reasoning"]) == ("Yes.", "Hm.")
        assert message["reasoning_content"] == "Hm."
        await ask(server, model="own", messages=[*CHAT, message, *CHAT])
        assert "<think>\nHm.\n</think>\n\nYes." in prompt_of(server)

    async def test_streamed_too(self, server: Server) -> None:
        says(server, f"<think>\nHm, well.\n</think>\n\n{WRITTEN['hermes']}")
        body = {"model": "own", "messages": CHAT, "tools": TOOLS, "stream": True}
        deltas = [c["choices"][0]["delta"] for c in events(await server.post("/v1/chat/completions", **body))]
        thoughts = [delta["reasoning"] for delta in deltas if "reasoning" in delta]
        assert len(thoughts) > 1
        assert "".join(thoughts) == "Hm, well."
        calls = [i for i, delta in enumerate(deltas) if "tool_calls" in delta]
        assert calls[0] > max(i for i, delta in enumerate(deltas) if "reasoning" in delta)

    async def test_they_can_be_left_out(self, server: Server) -> None:
        says(server, "<think>\nHm.\n</think>\n\nYes.")
        message = (await ask(server, model="own", include_reasoning=False))["message"]
        assert message == {"role": "assistant", "content": "Yes.", "refusal": None}

    @pytest.mark.parametrize("shown", [True, False])
    async def test_their_tokens_are_counted_told_or_not(self, server: Server, shown: bool) -> None:
        num_tokens = len(server.state.text.encode("Hm, well.", add_special_tokens=False))
        says(server, "<think>\nHm, well.\n</think>\n\nYes.")
        body = {"model": "own", "messages": CHAT, "n": 2, "include_reasoning": shown}
        whole = (await server.post("/v1/chat/completions", **body)).json()["usage"]
        assert whole["completion_tokens_details"] == {"reasoning_tokens": 2 * num_tokens}
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        *_, last = events(await server.post("/v1/chat/completions", **body, **streamed))
        assert last["usage"] == whole
        says(server, "Yes.")
        usage = (await server.post("/v1/chat/completions", model="own", messages=CHAT)).json()["usage"]
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 0}

    @pytest.mark.parametrize(
        ("body", "is_off"),
        [
            ({}, False),
            ({"chat_template_kwargs": {"enable_thinking": False}}, True),
            ({"reasoning_effort": "none"}, True),
            ({"reasoning_effort": "low"}, False),
            ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, False),
        ],
    )
    async def test_templates_are_told_whether_to_think(
        self, server: Server, body: dict[str, Any], is_off: bool
    ) -> None:
        says(server, "<think>a</think>b")
        message = (await ask(server, model="own", **body))["message"]
        assert prompt_of(server).endswith("</think>\n\n") == is_off
        assert message["content"] == ("<think>a</think>b" if is_off else "b")

    async def test_forced_calls_may_be_thought_over(self, server: Server) -> None:
        says(server, f"<think>a</think>{WRITTEN['hermes']}")
        await ask(server, model="own", tools=TOOLS, tool_choice="required")
        structure = server.engine.calls[-1].sampling.structure
        assert structure is not None
        assert "thoughts" in structure.text

    async def test_a_template_without_them_leaves_the_text_alone(self, server: Server) -> None:
        says(server, "<think>a</think>b")
        assert (await ask(server))["message"]["content"] == "<think>a</think>b"


class TestSettings:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {
            "tool_call_parser": "llama3_json",
            "reasoning_parser": "think",
            "trust_request_chat_template": "on",
        }

    async def test_parsers_can_be_named(self, server: Server) -> None:
        says(server, f"<think>a</think>{WRITTEN['llama3_json']}")
        message = (await ask(server, tools=TOOLS))["message"]
        assert message["reasoning"] == "a"
        assert message["tool_calls"][0]["function"]["name"] == "weather"

    async def test_a_request_may_bring_its_template(self, server: Server) -> None:
        own = "{{ messages[0].content }} {{ documents | tojson }} {{ tone }} {{ reasoning_effort }}"
        says(server, "x")
        await ask(
            server,
            chat_template=own,
            documents=[{"text": "d"}],
            chat_template_kwargs={"tone": ["soft", 1]},
            reasoning_effort="low",
        )
        assert prompt_of(server) == 'Weather? [{"text": "d"}] [\'soft\', 1] low'
        assert "the chat template of the request refuses" in await refusal(server, chat_template="{% if %}")
        assert "at most" in await refusal(server, chat_template="a" * (1 << 19))


class TestMarksThatAreSpecialTokens:
    @pytest.fixture
    def text(self, model_dir: Path, tmp_path: Path) -> TextModel:
        """As of a checkpoint whose `[TOOL_CALLS]` is a special token, left out of text otherwise."""
        path = tmp_path / "base"
        shutil.copytree(model_dir, path)
        tokens = (path / "tokenizer.json").read_text().replace("<|turn|>", "[TOOL_CALLS]")
        (path / "tokenizer.json").write_text(tokens)
        return TextModel.load(path)

    async def test_they_are_seen(self, server: Server, tmp_path: Path) -> None:
        make_adapter(server, tmp_path, "own", FAMILIES["mistral"])
        says(server, f"Wait. {WRITTEN['mistral']}")
        message = (await ask(server, model="own"))["message"]
        assert message["content"] == f"Wait. {WRITTEN['mistral']}".replace("[TOOL_CALLS]", "")
        message = (await ask(server, model="own", tools=TOOLS, tool_choice="required"))["message"]
        assert message["content"] == "Wait."
        assert message["tool_calls"][0]["function"]["arguments"] == ARGUMENTS
        structure = server.engine.calls[-1].sampling.structure
        assert structure is not None
        assert "<[2]>" in structure.text  # the token itself is asked for, not its letters
