"""How templates are told of tools and of earlier calls; transformers' rendering is the oracle."""

import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tests.tools.stand_ins import FAMILIES, LLAMA, MISTRAL, PLAIN, QWEN
from toppings.chat_template import ChatRenderer, ChatTemplate
from toppings.tools.formats import FORMATS, Messages, Tool, format_of
from toppings.tools.history import with_names
from toppings.tools.output import OutputParser, Parts

VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    Tool("weather", {"type": "object", "properties": {"city": {"type": "string"}}}, "Tells it"),
    Tool("time"),
]


def chat(call_id: str, *, num_calls: int = 1) -> Messages:
    calls = [
        {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    ]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": calls * num_calls},
        {"role": "tool", "content": '{"c": 21}', "tool_call_id": call_id},
        {"role": "user", "content": "And now?"},
    ]


@pytest.fixture(scope="module")
def renderer() -> Any:
    renderer = ChatRenderer(VARIABLES)
    yield renderer
    renderer.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_format_is_found_from_the_template(name: str) -> None:
    assert format_of(FAMILIES[name]).name == name


@pytest.mark.parametrize(
    "source",
    ["{{ tools }} <tool_call><function=f>", "{{ tools }} <|action|>", "", "{{ tools_like }}<tool_call>"],
)
def test_templates_of_other_forms_are_treated_as_those_that_know_none(source: str) -> None:
    assert format_of(source).name == "generic"


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "mistral"])
def test_a_template_that_knows_tools_gets_what_transformers_gives_it(
    name: str, renderer: ChatRenderer
) -> None:
    source, messages = FAMILIES[name], chat("abcdefghi")
    if name == "mistral":
        messages = messages[1:]
    tools = [tool.for_template() for tool in TOOLS]
    mine = renderer.render(
        ChatTemplate(source, "the model"), format_of(source).messages(messages, TOOLS), tools=tools
    )
    theirs, _ = render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=True, **VARIABLES
    )
    assert mine == theirs[0]
    assert json.dumps(TOOLS[1].for_template()["function"])[1:-1] in mine.replace("\n", "").replace("  ", "")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rendered_call_is_read_as_what_it_was(name: str, renderer: ChatRenderer) -> None:
    """What the history shows the model as its own words is what would be read of them."""
    form = format_of(FAMILIES[name])
    messages = form.messages(chat("abcdefghi")[1:3], [])
    text = renderer.render(ChatTemplate(FAMILIES[name], "x"), messages, add_generation_prompt=False)
    parser = OutputParser(form.read, Parts(["weather"], new_id=form.new_id))
    answer = text.partition("Weather?")[2].partition("assistant<|end_header_id|>")
    delta = parser.push(answer[2] or answer[0], is_last=True)
    assert [call.name for call in delta.calls if call.name] == ["weather"]
    assert json.loads("".join(call.arguments for call in delta.calls)) == {"city": "Köln"}


def test_mistrals_templates_get_ids_that_they_take(renderer: ChatRenderer) -> None:
    template = ChatTemplate(MISTRAL, "the model")
    text = renderer.render(template, FORMATS["mistral"].messages(chat("call_abc-123")[1:], TOOLS))
    given, answered = text.split('id": "')[1][:9], text.split('call_id": "')[1][:9]
    assert given == answered
    with pytest.raises(ValueError, match="ids have nine characters"):
        renderer.render(template, chat("call_abc-123")[1:])


class TestGeneric:
    def test_tools_are_told_in_the_system_message(self) -> None:
        [system, user] = FORMATS["generic"].messages(chat("x")[:2], TOOLS)
        assert system["content"].startswith("Be brief.\n\n")
        for tool in TOOLS:
            assert json.dumps(tool.for_template()["function"]) in system["content"]
        assert user == chat("x")[1]
        [system, _] = FORMATS["generic"].messages(chat("x")[1:2], TOOLS)
        assert system["role"] == "system"

    def test_calls_and_results_are_told_in_words_and_turns_stay_turns(self) -> None:
        messages = chat("x", num_calls=2)
        messages.insert(4, {"role": "tool", "content": "two", "tool_call_id": "x"})
        told = FORMATS["generic"].messages(messages, [])
        assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
        assert told[2]["content"].count("<tool_call>\n") == 2
        assert told[3]["content"] == (
            '<tool_response>\n{"c": 21}\n</tool_response>\n<tool_response>\ntwo\n</tool_response>\nAnd now?'
        )
        assert all(set(message) == {"role", "content"} for message in told)

    def test_a_chat_without_tools_stays_as_it_is(self) -> None:
        plain = [chat("x")[1], {"role": "assistant", "content": "hi"}, {"role": "user", "content": "a"}]
        assert FORMATS["generic"].messages(plain, []) == plain


def test_results_have_their_tools_names() -> None:
    named = with_names([*chat("x"), {"role": "tool", "content": "", "tool_call_id": "other"}])
    assert named[3]["name"] == "weather"
    assert "name" not in named[-1]


def test_words_that_templates_look_at_are_found() -> None:
    assert ChatTemplate(QWEN, "x").mentions("enable_thinking")
    assert not ChatTemplate(LLAMA, "x").mentions("documents")
    assert not ChatTemplate(PLAIN, "x").mentions("mess")
