"""Structures that no engine may be given: wrong, impossible, unsupported, or too much; each with a word of
what the refusal must say."""

import json
from typing import Any, NamedTuple


class Refused(NamedTuple):
    kind: str
    text: str
    word: str


def _schema(schema: Any, word: str) -> Refused:
    return Refused("json_schema", json.dumps(schema), word)


def _nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + '{"type":"null"}' + "}" * depth


WRONG = {
    "no JSON": Refused("json_schema", "{", "Expecting"),
    "NaN": Refused("json_schema", '{"const": NaN}', "NaN"),
    "a list as a schema": _schema([], "object or boolean"),
    "a text as a schema": _schema("x", "object or boolean"),
    "an unknown type": _schema({"type": "strin"}, "strin"),
    "a number as a type": _schema({"type": ["string", 1]}, "type must be a string"),
    "properties that are a list": _schema({"type": "object", "properties": []}, "properties"),
    "an enum that is a text": _schema({"enum": "a"}, "enum"),
    "required that is a text": _schema({"type": "object", "required": "a"}, "required"),
    "a text as a bound": _schema({"type": "integer", "minimum": "1"}, "minimum"),
    "a negative length": _schema({"type": "string", "maxLength": -1}, "maxLength"),
    "a broken pattern": _schema({"type": "string", "pattern": "("}, "unclosed group"),
    "a reference to nothing": _schema({"$ref": "#/$defs/nope"}, "nope"),
    "a reference to the web": _schema({"$ref": "http://127.0.0.1:9/x"}, "127.0.0.1:9"),
    "a reference to a file": _schema({"$ref": "file:///etc/passwd"}, "/etc/passwd"),
    "choices that are none": Refused("choice", "[]", "at least one"),
    "choices of numbers": Refused("choice", '["a", 1]', "holds 1"),
    "an empty choice": Refused("choice", '["a", ""]', '""'),
    "choices in an object": Refused("choice", "{}", "list"),
    "an unclosed class": Refused("regex", "[a", "unclosed character class"),
    "an unclosed group": Refused("regex", "(a", "unclosed group"),
    "a repetition of nothing": Refused("regex", "*a", "repetition"),
    "a repetition backwards": Refused("regex", "a{2,1}", "repetition"),
    "an unknown escape": Refused("regex", r"a\Z", "escape"),
    "an unknown rule": Refused("grammar", "start: foo", "foo"),
    "no start": Refused("grammar", 'a: "x"', "start"),
    "an unclosed text": Refused("grammar", 'start: "a', "a"),
    "an unknown special token": Refused("grammar", "start: <nope>", "nope"),
    "a broken GBNF": Refused("grammar", 'root ::= "a', "GBNF"),
    "an unknown GBNF rule": Refused("grammar", "root ::= foo", "foo"),
    "a broken schema in a grammar": Refused("grammar", 'start: %json {"type": "strin"}', "strin"),
}
IMPOSSIBLE = {
    "false": _schema(False, "no output"),
    "no alternatives": _schema({"anyOf": []}, "Unsatisfiable"),
    "an empty enum": _schema({"enum": []}, "Unsatisfiable"),
    "two types at once": _schema({"allOf": [{"type": "string"}, {"type": "null"}]}, "Unsatisfiable"),
    "bounds that cross": _schema({"type": "integer", "minimum": 5, "maximum": 2}, "greater than maximum"),
    "lengths that cross": _schema({"type": "string", "minLength": 5, "maxLength": 2}, "than maxLength"),
    "a property that cannot be": _schema(
        {"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a'"
    ),
    "a reference to itself": _schema({"$ref": "#"}, "no output"),
    "a rule that never ends": Refused("grammar", "start: start", "no output"),
}
UNSUPPORTED = {
    keyword: _schema({"type": kind, keyword: value}, keyword)
    for keyword, kind, value in (
        ("not", "object", {"required": ["a"]}),
        ("if", "object", {"required": ["a"]}),
        ("contains", "array", {"type": "integer"}),
        ("uniqueItems", "array", True),
        ("propertyNames", "object", {"maxLength": 3}),
        ("dependentRequired", "object", {"a": ["b"]}),
        ("unevaluatedProperties", "object", False),
        ("$dynamicRef", "object", "#x"),
        ("format", "string", "json-pointer"),
    )
} | {
    "oneOf that overlaps": _schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    "a look-ahead": Refused("regex", "a(?=b)", "look-around"),
    "a back-reference": Refused("regex", r"(a)\1", "backreference"),
    "a word's edge": Refused("regex", r"\bfoo\b", "lookaround"),
}
TOO_MUCH = {
    "deep brackets": Refused("regex", "(" * 5000 + "a" + ")" * 5000, "regex"),
    "deeper brackets": Refused("grammar", "start: " + "(" * 100_000 + '"a"' + ")" * 100_000, "deep"),
    "a deep schema": Refused("json_schema", _nested(600), "recursion"),
    "powers of repetitions": _schema(
        {"type": "string", "pattern": "^((a{0,999}){0,999}){0,999}$"}, "too many"
    ),
    "repetitions of a rule": Refused("grammar", 'start: ("a"{1000}){1000}', "oo many"),
    "a rule without an end": Refused("grammar", 'start: "a" start', "oo many"),
    "a product of alternatives": _schema(
        {
            "allOf": [
                {"anyOf": [{"type": "object", "required": [f"a{i}_{j}"]} for j in range(6)]} for i in range(8)
            ]
        },
        "too large",
    ),
    "multiples of large primes": _schema(
        {"allOf": [{"type": "integer", "multipleOf": p} for p in (7919, 7907, 7901, 7883)]}, "too many"
    ),
    "hundreds of optional properties": _schema(
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(700)}}, "max is 2000"
    ),
    "a text too long": Refused("regex", "a" * 300_000, "at most"),
}
REFUSED = {**WRONG, **IMPOSSIBLE, **UNSUPPORTED, **TOO_MUCH}
