"""Answers of every format, whole and in pieces: what is a call, what is content, what is thought."""

import re
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toppings.tools import reasoning
from toppings.tools.formats import FORMATS, ToolFormat
from toppings.tools.output import OutputParser, Parts, read_content
from toppings.tools.reader import PiecewiseText, Reading

NAMES = ("weather", "time")
ARGUMENTS = '{"city": "M\\u00fcnchen \\"[x]\\" {", "days": [1, 2.5e3, null], "deep": {"a": {"b": []}}}'
HERMES, LLAMA, MISTRAL = FORMATS["hermes"], FORMATS["llama3_json"], FORMATS["mistral"]


class Answer(NamedTuple):
    content: str
    calls: list[tuple[str, str]]
    reasoning: str = ""


def parser_of(form: ToolFormat, *, thinks: bool = False, is_single: bool = False) -> OutputParser:
    read = reasoning.after_reasoning(form.read, is_begun=False) if thinks else form.read
    return OutputParser(read, Parts(NAMES, new_id=form.new_id, is_single=is_single))


def answer_of(parser: OutputParser, pieces: list[str]) -> Answer:
    """Put together as clients do; checks that the pieces are in the order that they expect."""
    content, thoughts = "", ""
    calls: list[tuple[str, str]] = []
    for i, piece in enumerate(pieces):
        delta = parser.push(piece, is_last=i == len(pieces) - 1)
        content += delta.content
        thoughts += delta.reasoning
        for call in delta.calls:
            if call.id is not None:
                assert call.index == len(calls)
                assert call.name is not None
                calls.append((call.name, ""))
            assert call.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + call.arguments)
    return Answer(content, calls, thoughts)


def whole(form: ToolFormat, text: str, **options: bool) -> Answer:
    return answer_of(parser_of(form, **options), [text])


CALL = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
REVERSED = f'{{"arguments": {ARGUMENTS}, "name": "weather", "id": "abc"}}'
ONE = [("weather", ARGUMENTS)]
TWO = [("weather", ARGUMENTS), ("time", "{}")]
NOT_QUITE = Answer("", [("time", '{"a": [NaN, -1e+5, true, null]}')])

CALLS: list[tuple[ToolFormat, str, Answer]] = [
    (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", Answer("", ONE)),
    (HERMES, f"Let me see.\n\n<tool_call>{REVERSED}</tool_call>\n", Answer("Let me see.", ONE)),
    (HERMES, f'<tool_call>{CALL}</tool_call>\n<tool_call>{{"name":"time"}}</tool_call>', Answer("", TWO)),
    (HERMES, f"<tool_call>{CALL}", Answer("", ONE)),
    (HERMES, f"<tool_call>{CALL}\n</tool_c", Answer("", ONE)),
    (HERMES, f"<tool_call>{CALL}\n</tools>", Answer("</tools>", ONE)),
    (HERMES, f"<tool_call>{CALL}</tool_call> done ", Answer(" done", ONE)),
    (LLAMA, CALL.replace("arguments", "parameters"), Answer("", ONE)),
    (LLAMA, f"\n {CALL}", Answer("", ONE)),
    (LLAMA, f'{CALL}; {{"type": "function", "name": "time", "parameters": {{}}}}', Answer("", TWO)),
    (LLAMA, f"Well: <|python_tag|>{CALL}", Answer("Well:", ONE)),
    (LLAMA, f"<|python_tag|>{CALL}", Answer("", ONE)),
    (MISTRAL, f"[TOOL_CALLS][{CALL}]", Answer("", ONE)),
    (
        MISTRAL,
        f'I will. [TOOL_CALLS] [{REVERSED}, {{"name": "time", "arguments": {{}}}}]',
        Answer("I will.", TWO),
    ),
    (MISTRAL, f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]time[ARGS]{{}}", Answer("", TWO)),
    (MISTRAL, f"[TOOL_CALLS]weather[CALL_ID]abc123def[ARGS]{ARGUMENTS}", Answer("", ONE)),
    (MISTRAL, f"[TOOL_CALLS]weather {ARGUMENTS}", Answer("", ONE)),
    (MISTRAL, f'[TOOL_CALLS][{CALL}, {{"na', Answer("", ONE)),
    (HERMES, f'<tool_call>{CALL}</tool_call>\n<tool_call>{{"na', Answer("", ONE)),
    (HERMES, f"<tool_call>{CALL}</tool_call>\n<tool_cal", Answer("", ONE)),
    (HERMES, f"<tool_call>{CALL}</tool_call> a < b\n\n<", Answer(" a < b", ONE)),
    (LLAMA, f"{CALL} <|python", Answer("", ONE)),
    (MISTRAL, f"[TOOL_CALLS][{CALL}]\n[TOOL", Answer("", ONE)),
    (HERMES, '<tool_call>{"arguments": {"a": [NaN, -1e+5, true, null]}, "name": "time"}', NOT_QUITE),
]
CONTENT: list[tuple[ToolFormat, str]] = [
    (HERMES, " Plain, with a < and <tool and <tool_cal. \n"),
    (HERMES, "<tool_call>no JSON</tool_call>"),
    (HERMES, '<tool_call>{"name": "weather", "arguments": "text"}</tool_call>'),
    (HERMES, '<tool_call>{"name": 7, "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "weather", "city": "Rome"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "weat'),
    (HERMES, "<tool_call>"),
    (HERMES, '<tool_call>{"arguments": ' + "[" * 20000),
    (HERMES, '<tool_call>{"name": "a\\ud83d", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"\\udc00": 1}</tool_call>'),
    (LLAMA, '{"name": "Ada", "parameters": {}}'),
    (LLAMA, '{"city": "Rome"}'),
    (LLAMA, '{"name": "weather"'),
    (LLAMA, '<|python_tag|>brave_search.call(query="x")'),
    (LLAMA, 'Call {"name": "weather", "parameters": {}}'),
    (MISTRAL, "[TOOL_CALLS]"),
    (MISTRAL, "[TOOL_CALLS][]"),
    (MISTRAL, "[TOOL_CALLS]weather[ARGS]3"),
    (MISTRAL, "[TOOL_CALLS](weather)"),
    (MISTRAL, "[TOOL_CALL"),
]


@pytest.mark.parametrize(("form", "text", "expected"), CALLS)
def test_calls_are_read(form: ToolFormat, text: str, expected: Answer) -> None:
    assert whole(form, text) == expected


@pytest.mark.parametrize(("form", "text"), CONTENT)
def test_what_is_no_call_is_content(form: ToolFormat, text: str) -> None:
    assert whole(form, text) == Answer(text, [])


@given(st.data())
def test_pieces_say_what_the_whole_says(data: st.DataObject) -> None:
    cases = [(form, text) for form, text, _ in CALLS] + [each for each in CONTENT if len(each[1]) < 999]
    form, text = data.draw(st.sampled_from(cases))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=len(text))))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    thoughts = data.draw(st.sampled_from(["", "<think>", "<think>\nHm {\n\n</think>\n\n"]))
    expected = whole(form, thoughts + text, thinks=True)
    assert answer_of(parser_of(form, thinks=True), [*thoughts, *pieces]) == expected
    if thoughts.endswith("\n"):
        assert expected == whole(form, text.lstrip())._replace(reasoning="Hm {")


@given(st.sampled_from(list(FORMATS.values())), st.text(alphabet='<>[]{}":,;\\ aname' + "\n", max_size=80))
def test_no_text_makes_it_fail_and_none_is_lost(form: ToolFormat, text: str) -> None:
    answer = whole(form, form.marks[0] + text)
    if not answer.calls:
        assert answer.content == form.marks[0] + text


@pytest.mark.parametrize(
    "begin", ['{"name":[', '{"id":{"a":[', '{"arguments":{', '{"id":["', '{"type":1', "{"]
)
@pytest.mark.parametrize(
    ("form", "mark"),
    [
        (HERMES, "<tool_call>"),
        (LLAMA, "<|python_tag|>"),
        (MISTRAL, "[TOOL_CALLS]["),
        (MISTRAL, "[TOOL_CALLS]a"),
    ],
)
@pytest.mark.parametrize("end", ["", "]}", '"'])
def test_what_is_no_call_is_not_read_again_and_again(
    form: ToolFormat, mark: str, begin: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that are begun within one another: twice as many take twice the steps, not four times."""
    num_steps, peek = 0, PiecewiseText.peek

    def counted(text: PiecewiseText) -> Reading[str]:
        nonlocal num_steps
        num_steps += 1
        return peek(text)

    monkeypatch.setattr(PiecewiseText, "peek", counted)
    taken = []
    for num_begun in (40, 80):
        num_steps, text = 0, (mark + begin) * num_begun + end * num_begun
        answer = whole(form, text)
        assert answer.content == text or answer.calls
        taken.append(num_steps)
    assert taken[1] < 2.5 * taken[0]


@given(st.text(max_size=60))
def test_plain_text_comes_through_as_it_is(text: str) -> None:
    assert answer_of(OutputParser(read_content, Parts()), [*list(text), ""]).content == text


def test_arguments_come_as_they_are_written() -> None:
    parser = parser_of(HERMES)
    assert parser.push('<tool_call>\n{"name": "weather", ').calls == []
    [begun] = parser.push('"arguments": {"city"').calls
    assert (begun.name, begun.index, begun.arguments) == ("weather", 0, '{"city"')
    assert re.fullmatch(r"call_[a-zA-Z0-9]{24}", begun.id or "")
    assert "".join(call.arguments for call in parser.push(': "Ro').calls) == ': "Ro'
    assert not parser.has_called
    assert "".join(call.arguments for call in parser.push('me"}}').calls) == 'me"}'
    assert parser.has_called


def test_what_ends_within_arguments_is_a_call_that_was_cut() -> None:
    parser = parser_of(HERMES)
    answer = answer_of(parser, ['<tool_call>{"name": "weather", "arguments": {"city": "Ro'])
    assert answer == Answer("", [("weather", '{"city": "Ro')])
    assert not parser.has_called


def test_a_single_call_is_the_only_one() -> None:
    text = f'<tool_call>{CALL}</tool_call><tool_call>{{"name": "time"}}</tool_call> more'
    parser = parser_of(HERMES, is_single=True)
    assert answer_of(parser, list(text)) == Answer("", ONE)
    assert parser.is_done


def test_mistrals_ids_are_nine_letters_and_digits() -> None:
    delta = parser_of(MISTRAL).push(f"[TOOL_CALLS][{CALL}]")
    assert re.fullmatch(r"[a-zA-Z0-9]{9}", delta.calls[0].id or "")


class TestThoughts:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("<think>\nOne\n\nTwo\n</think>\n\nYes", Answer("Yes", [], "One\n\nTwo")),
            ("<think></think>Yes", Answer("Yes", [])),
            ("<think>cut in the mid", Answer("", [], "cut in the mid")),
            (" Yes <think>no</think>", Answer(" Yes <think>no</think>", [])),
            (f"<think>a</think>\n<tool_call>{CALL}</tool_call>", Answer("", ONE, "a")),
        ],
    )
    def test_they_are_told_apart(self, text: str, expected: Answer) -> None:
        assert whole(HERMES, text, thinks=True) == expected
        assert answer_of(parser_of(HERMES, thinks=True), list(text)) == expected

    def test_a_prompt_may_have_begun_them(self) -> None:
        parser = OutputParser(reasoning.after_reasoning(read_content, is_begun=True), Parts())
        assert answer_of(parser, ["a\n</th", "ink>b"]) == Answer("b", [], "a")
        assert reasoning.is_begun("<|assistant|><think>\n")
        assert reasoning.is_over("<think>\n\n</think>\n\n")
