"""Grammars (Lark's notation, JSON schemas within) of answers that are calls, with the thoughts before."""

import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from toppings.sampling_params import Structure, StructureKind
from toppings.tools import reasoning
from toppings.tools.formats import Tool, ToolFormat

TEXT = "/(\\n|.)*/"
BLANKS = "/[ \\t\\r\\n]{0,8}/"
NO_ARGUMENTS = {"type": "object", "properties": {}}
WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as models have mostly seen it, with no white space that they could go on with for ever."""

OPENING = {
    *("additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "if", "not"),
    *("$ref", "$dynamicRef", "dependentSchemas"),
}
"""What may allow properties beside those that a schema names itself."""
OPTIONS = "x-guidance"
"""Where a schema says how it is to be read."""

Tokens = Mapping[str, int]
"""Marks that are one token of the vocabulary, with its id; the others are written out."""


class Thoughts(Enum):
    """What an answer begins with."""

    NONE = "none"
    POSSIBLE = "possible"
    BEGUN = "begun"  # by the prompt


def answer_grammar(
    form: ToolFormat,
    tools: Sequence[Tool],
    tokens: Tokens,
    *,
    thoughts: Thoughts = Thoughts.NONE,
    is_single: bool = False,
    other: str | None = None,
) -> str:
    """An answer that calls tools, or says `other`, if that is given, which stands on a rule's right side."""
    more = "" if is_single else f" ({_literal(form.between, tokens)} call)*".replace('("" ', "(")
    calls = f"{_literal(form.start, tokens)} call{more} {_literal(form.end, tokens)}"
    rules = [f"calls: {calls}", *_call_rules(form, tools, tokens)]
    if other is None:
        body = "calls"
    else:
        body = "(calls | other)"
        rules.append(f"other: {other}")
    return _with_thoughts(body, rules, tokens, thoughts)


def free_grammar(
    form: ToolFormat, tools: Sequence[Tool], tokens: Tokens, *, thoughts: Thoughts = Thoughts.NONE
) -> str:
    """Any answer whose calls are right: what follows the format's trigger is a call of one of `tools`."""
    if not form.trigger:
        first = "{<" if thoughts is Thoughts.POSSIBLE else "{"
        rules = [
            f"calls: call ({_literal(form.between, tokens)} call)*",
            f"words: /[ \\t\\r\\n]*([^{first} \\t\\r\\n](\\n|.)*)?/",
            *_call_rules(form, tools, tokens),
        ]
        return _with_thoughts("(calls | words)", rules, tokens, thoughts)
    # A trigger that is plain text belongs to what leads up to it, and is taken off what follows.
    lead = "" if form.trigger in tokens else form.trigger
    unit = "call"
    if form.start:
        start, between, end = (
            _literal(t, tokens) for t in (form.start.removeprefix(lead), form.between, form.end)
        )
        unit = f"{start} call ({between} call)* {end}"
    rules = [f"unit: {unit}", f"TEXT: {TEXT}", *_call_rules(form, tools, tokens, lead=lead)]
    if not lead:
        return _with_thoughts("TEXT (unit TEXT)*", rules, tokens, thoughts)
    rules.append(f"lead[lazy]: /(\\n|.)*{_escaped(re.escape(lead))}/")
    return _with_thoughts("(lead unit)* TEXT", rules, tokens, thoughts)


def after_thoughts(body: str, tokens: Tokens, thoughts: Thoughts) -> str:
    """`body`, the right side of a rule, after what the model thinks."""
    return _with_thoughts(body, [], tokens, thoughts)


def rule_of(structure: Structure) -> str:
    """The right side of a rule for what a structure accepts."""
    text = structure.text
    match structure.kind:
        case StructureKind.JSON_OBJECT:
            return json_rule(_compact({"type": "object"}))
        case StructureKind.JSON_SCHEMA:
            return json_rule(_compact(json.loads(text)))
        case StructureKind.CHOICE:
            return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
        case StructureKind.REGEX:
            return f"/{_escaped(text)}/"
        case StructureKind.GRAMMAR:
            return f"%lark {{\n{text}\n}}"


def _compact(schema: dict[str, Any] | bool) -> dict[str, Any] | bool:
    """The schema, which may say more of how it is to be read, with JSON written as models have seen it."""
    if isinstance(schema, bool):
        return schema
    return {**schema, OPTIONS: {**WRITTEN, **schema.get(OPTIONS, {})}}


def _escaped(pattern: str) -> str:
    """A pattern as it stands between slashes."""
    parts = re.findall(r"\\.|[^\\]", pattern, re.DOTALL)
    return "".join({"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(part, part) for part in parts)


def json_rule(schema: dict[str, Any] | bool) -> str:
    """The right side of a rule for JSON that a schema accepts."""
    return f"%json {json.dumps(schema, ensure_ascii=False)}"


def _with_thoughts(body: str, rules: list[str], tokens: Tokens, thoughts: Thoughts) -> str:
    if thoughts is Thoughts.NONE:
        return "\n".join([f"start: {body}", *rules, ""])
    begin = _literal(reasoning.BEGIN, tokens)
    start = f"({begin} thoughts)? {body}" if thoughts is Thoughts.POSSIBLE else f"thoughts {body}"
    return "\n".join([f"start: {start}", *rules, *_thought_rules(tokens), ""])


def _thought_rules(tokens: Tokens) -> list[str]:
    blanks = f"BLANKS: {BLANKS}"
    if reasoning.END in tokens:
        return [f"thoughts: THOUGHT {_literal(reasoning.END, tokens)} BLANKS", f"THOUGHT: {TEXT}", blanks]
    return ["thoughts: thought BLANKS", "thought[lazy]: /(\\n|.)*<\\/think>/", blanks]


def _call_rules(form: ToolFormat, tools: Sequence[Tool], tokens: Tokens, *, lead: str = "") -> list[str]:
    """`lead` is there before a call, and left out of it."""
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        before, after = form.around(tool.name)
        rules.append(
            f"call_{i}: {_literal(before.removeprefix(lead), tokens)} args_{i} {_literal(after, tokens)}"
        )
        rules.append(f"args_{i}: {json_rule(_schema_of(tool))}")
    return rules


def _schema_of(tool: Tool) -> dict[str, Any]:
    """What a schema asks for that cannot be followed is left to the tool, unless it is strict."""
    schema = {"type": "object", **(tool.parameters or NO_ARGUMENTS)}
    closed = schema if "allOf" in json.dumps(schema) else _closed(schema)
    return {**closed, OPTIONS: {**WRITTEN, "lenient": not tool.is_strict}}


def _closed(schema: Any) -> Any:
    """The schema with no other properties than those it names, where it does not say: a call has the
    arguments that its tool knows, and a weak model would go on inventing some."""
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for key in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(key), dict):
            closed[key] = {name: _closed(each) for name, each in schema[key].items()}
    for key in ("items", "additionalProperties"):
        if key in schema:
            closed[key] = _closed(schema[key])
    for key in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(schema.get(key), list) and "properties" not in schema:
            closed[key] = [_closed(each) for each in schema[key]]
    if "properties" in schema and not OPENING & schema.keys():
        closed["additionalProperties"] = False
    return closed


def _literal(text: str, tokens: Tokens) -> str:
    """A text on a rule's right side, marks that are tokens by their ids."""
    marks = sorted(tokens, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
    written = [
        f"<[{tokens[piece]}]>" if piece in tokens else json.dumps(piece, ensure_ascii=False)
        for piece in pieces
        if piece
    ]
    return " ".join(written) or '""'
