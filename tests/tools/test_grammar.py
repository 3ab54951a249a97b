"""What grammars of calls accept, over a vocabulary that has the marks of calls as tokens and one without.
The library that engines use is the judge."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llguidance
import pytest
from tokenizers import AddedToken, Tokenizer

from toppings.demo import demo_model_dir
from toppings.sampling_params import Structure, StructureKind
from toppings.tools.formats import FORMATS, Tool, ToolFormat
from toppings.tools.grammar import Thoughts, after_thoughts, answer_grammar, free_grammar, json_rule, rule_of

PLAIN_MARKS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
SPECIAL_MARKS = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [Tool("weather", PARAMETERS), Tool("time")]
Call = tuple[str, dict[str, Any]]

ROME: Call = ("weather", {"city": "Rome", "days": 3})
NOW: Call = ("time", {})
B = {"properties": {"b": {}}, "required": ["b"]}
BAD: list[Call] = [
    ("weather", {"city": "Rome"}),
    ("weather", {"city": 3, "days": 3}),
    ("wind", {}),
]
BEFORE = {
    Thoughts.NONE: "",
    Thoughts.POSSIBLE: "<think>Hm {\n</think>\n\n",
    Thoughts.BEGUN: "\nHm {\n</think>\n",
}


class Judge:
    def __init__(self, *, has_marks: bool) -> None:
        self.tokenizer = Tokenizer.from_file(str(Path(demo_model_dir()) / "tokenizer.json"))
        self.tokens: Mapping[str, int] = {}
        if has_marks:
            self.tokenizer.add_tokens([AddedToken(mark, special=False) for mark in PLAIN_MARKS])
            self.tokenizer.add_special_tokens(list(SPECIAL_MARKS))
            self.tokens = {m: self.tokenizer.token_to_id(m) or 0 for m in PLAIN_MARKS + SPECIAL_MARKS}
        size = self.tokenizer.get_vocab_size()
        self.vocabulary = llguidance.LLTokenizer(self.tokenizer.to_str(), n_vocab=size, eos_token=[0])

    def accepts(self, grammar: str, text: str) -> bool:
        matcher = llguidance.LLMatcher(self.vocabulary, llguidance.LLMatcher.grammar_from_lark(grammar))
        assert not matcher.is_error(), matcher.get_error()
        token_ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@pytest.fixture(scope="module", params=[False, True], ids=["text", "tokens"])
def judge(request: pytest.FixtureRequest) -> Judge:
    return Judge(has_marks=request.param)


def written(form: ToolFormat, *calls: Call) -> str:
    return form.start + form.between.join(json.dumps(a).join(form.around(n)) for n, a in calls) + form.end


@pytest.mark.parametrize("thoughts", Thoughts)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
class TestEachFormat:
    def test_a_forced_answer_is_calls(self, judge: Judge, form: ToolFormat, thoughts: Thoughts) -> None:
        grammar, before = answer_grammar(form, TOOLS, judge.tokens, thoughts=thoughts), BEFORE[thoughts]
        for good in (written(form, ROME), written(form, ROME, NOW, ROME)):
            assert judge.accepts(grammar, before + good)
        for bad in ("Hello", "", *(written(form, call) for call in BAD)):
            assert not judge.accepts(grammar, before + bad)
        assert judge.accepts(grammar, written(form, ROME)) == (thoughts is not Thoughts.BEGUN)

    def test_it_may_be_one_call_or_something_else(
        self, judge: Judge, form: ToolFormat, thoughts: Thoughts
    ) -> None:
        grammar = answer_grammar(
            form, TOOLS, judge.tokens, thoughts=thoughts, is_single=True, other=json_rule({"const": [1]})
        )
        before = BEFORE[thoughts]
        assert judge.accepts(grammar, before + "[1]")
        assert judge.accepts(grammar, before + written(form, ROME))
        assert not judge.accepts(grammar, before + written(form, ROME, NOW))
        assert not judge.accepts(grammar, before + "[2]")

    def test_a_free_answers_calls_are_right(self, judge: Judge, form: ToolFormat, thoughts: Thoughts) -> None:
        grammar, before = free_grammar(form, TOOLS, judge.tokens, thoughts=thoughts), BEFORE[thoughts]
        for good in ("Just text, [] and so on.\n", written(form, ROME), written(form, ROME, NOW)):
            assert judge.accepts(grammar, before + good)
        for bad in BAD:
            assert not judge.accepts(grammar, before + written(form, bad))
        if form.trigger:
            assert judge.accepts(grammar, f"{before}Wait: {written(form, ROME)} there.")
            assert not judge.accepts(grammar, f"{before}Wait: {written(form, BAD[0])}")


@pytest.mark.parametrize(
    ("structure", "good", "bad"),
    [
        (Structure(StructureKind.JSON_OBJECT), '{"a": [1]}', "[1]"),
        (Structure(StructureKind.JSON_SCHEMA, '{"type": "integer"}'), "12", '"12"'),
        (Structure(StructureKind.CHOICE, '["a\\"b", "c/d"]'), 'a"b', "a"),
        (Structure(StructureKind.REGEX, "(a/b|\\/)\n\\d+"), "a/b\n12", "a/b\n"),
        (Structure(StructureKind.GRAMMAR, 'start: x\nx: "(" x ")" | "}"'), "((}))", "(("),
    ],
)
def test_structures_hold_after_thoughts(judge: Judge, structure: Structure, good: str, bad: str) -> None:
    grammar = after_thoughts(rule_of(structure), judge.tokens, Thoughts.BEGUN)
    assert judge.accepts(grammar, f"hm</think>\n{good}")
    assert not judge.accepts(grammar, f"hm</think>\n{bad}")
    form = FORMATS["hermes"]
    grammar = answer_grammar(form, TOOLS, judge.tokens, other=rule_of(structure))
    assert judge.accepts(grammar, good)
    assert judge.accepts(grammar, written(form, NOW))
    assert not judge.accepts(grammar, bad)


def test_what_cannot_be_followed_is_left_out_unless_the_tool_is_strict(judge: Judge) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "uniqueItems": True}},
        "not": {"required": ["b"]},
    }
    form = FORMATS["hermes"]
    lenient = answer_grammar(form, [Tool("f", schema)], judge.tokens)
    assert judge.accepts(lenient, written(form, ("f", {"a": [1, 1]})))
    strict = answer_grammar(form, [Tool("f", schema, is_strict=True)], judge.tokens)
    with pytest.raises(AssertionError, match="not"):
        judge.accepts(strict, "")


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"properties": {"a": {}}}, {"a": 1}, {"b": 1}),
        ({"properties": {"a": {"properties": {"b": {}}}}}, {"a": {"b": 1}}, {"a": {"c": 1}}),
        ({"properties": {"a": {"items": {"properties": {"b": {}}}}}}, {"a": [{"b": 1}]}, {"a": [{"c": 1}]}),
        ({"properties": {"a": {}}, "additionalProperties": True}, {"b": 1}, None),
        ({"properties": {"a": {}}, "anyOf": [B]}, {"a": 1, "b": 1}, {}),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, {"a": 1, "b": 1}, None),
        ({}, {"anything": []}, None),
    ],
)
def test_a_call_has_the_arguments_that_its_tool_knows(
    judge: Judge, schema: dict[str, Any], good: dict[str, Any], bad: dict[str, Any] | None
) -> None:
    form = FORMATS["hermes"]
    grammar = answer_grammar(form, [Tool("f", {"type": "object", **schema})], judge.tokens)
    assert judge.accepts(grammar, written(form, ("f", good)))
    assert bad is None or not judge.accepts(grammar, written(form, ("f", bad)))
