"""The keywords of JSON Schema that the document lists are honoured: what is allowed is what another validator
accepts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from toppings.sandbox.grammars import FORMATS, byte_vocabulary, check, matcher_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "structured-output.md"

ANYTHING: tuple[Any, ...] = (1, -7, 2.5, "a", "abc", True, None, [], [1], {}, {"a": 1})
KEYWORDS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "type": ({"type": ["integer", "null"]}, ANYTHING),
    "enum": ({"enum": [1, "a", [1], {"a": 1}]}, ANYTHING),
    "const": ({"const": {"a": 1}}, ANYTHING),
    "minimum": ({"type": "number", "minimum": 2}, (1, 2, 2.5, -3)),
    "maximum": ({"type": "number", "maximum": 2}, (1, 2, 2.5, -3)),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 2}, (1, 2, 3)),
    "exclusiveMaximum": ({"type": "integer", "exclusiveMaximum": 2}, (1, 2, 3)),
    "multipleOf": ({"type": "number", "multipleOf": 0.5}, (0, 1, 1.5, 1.25)),
    "minLength": ({"type": "string", "minLength": 2}, ("", "a", "ab", "üü", "😀")),
    "maxLength": ({"type": "string", "maxLength": 2}, ("", "ab", "abc", "😀😀", "üüü")),
    "pattern": ({"type": "string", "pattern": "^a+[0-9]"}, ("a", "a1", "aa1x", "ba1")),
    "format": ({"type": "string", "format": "date"}, ("2024-02-29", "2024-2-9", "tomorrow")),
    "items": ({"type": "array", "items": {"type": "integer"}}, ([], [1], [1, 2], [1, "a"])),
    "prefixItems": ({"type": "array", "prefixItems": [{"const": 1}], "items": False}, ([], [1], [2], [1, 1])),
    "minItems": ({"type": "array", "minItems": 2}, ([], [1], [1, 2])),
    "maxItems": ({"type": "array", "maxItems": 1}, ([], [1], [1, 2])),
    "properties": ({"type": "object", "properties": {"a": {"type": "integer"}}}, ({}, {"a": 1}, {"a": "b"})),
    "required": ({"type": "object", "required": ["a"]}, ({}, {"a": 1}, {"b": 1})),
    "additionalProperties": (
        {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "null"}},
        ({"a": 1}, {"b": None}, {"b": 1}, {}),
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^x-": {"type": "null"}}},
        ({"x-a": None}, {"x-a": 1}, {"y": 1}),
    ),
    "minProperties": ({"type": "object", "minProperties": 1}, ({}, {"a": 1}, {"a": 1, "b": 2})),
    "maxProperties": ({"type": "object", "maxProperties": 1}, ({}, {"a": 1}, {"a": 1, "b": 2})),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]}, ANYTHING),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 1}]}, ANYTHING),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "null"}]}, ANYTHING),
    "$ref": (
        {"$defs": {"n": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/n"}},
        ANYTHING,
    ),
    "$defs": ({"$defs": {"n": {"type": "null"}}, "$ref": "#/$defs/n"}, ANYTHING),
    "$anchor": ({"$defs": {"n": {"$anchor": "x", "type": "null"}}, "$ref": "#x"}, ANYTHING),
    "$id": ({"$id": "http://x/y", "$defs": {"n": {"$id": "z", "type": "null"}}, "$ref": "z"}, ANYTHING),
}
GOOD_FORMATS = {
    "date": "2024-02-29",
    "time": "12:30:00Z",
    "date-time": "2024-02-29T12:30:00Z",
    "duration": "P1DT2H",
    "email": "a@b.org",
    "hostname": "a.example",
    "ipv4": "127.0.0.1",
    "ipv6": "::1",
    "uri": "https://example.org/a",
    "uuid": "123e4567-e89b-12d3-a456-426614174000",
}


def accepts(schema: Any, value: Any) -> bool:
    text = check(structure_kind="json_schema", text=json.dumps(schema), special_tokens=[], vocab_size=257)
    matcher = matcher_of(byte_vocabulary([]), "json_schema", text)
    tokens = list(json.dumps(value, ensure_ascii=False).encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def listed(heading: str) -> set[str]:
    """The names that the document's paragraph after `heading` lists."""
    found = re.search(rf"\n{heading}:(.*?)\n\n", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None, f"the document has no paragraph that begins with {heading}"
    return set(re.findall(r"`([^`]+)`", found[1]))


def test_the_document_lists_what_is_tried_here() -> None:
    assert listed("Keywords") == set(KEYWORDS)
    assert listed("Formats") == set(GOOD_FORMATS)
    assert set(GOOD_FORMATS) < set(FORMATS)


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_a_keyword_allows_what_the_validator_accepts(keyword: str) -> None:
    schema, values = KEYWORDS[keyword]
    validator = Draft202012Validator(schema, format_checker=FormatChecker())
    allowed = [accepts(schema, value) for value in values]
    assert allowed == [validator.is_valid(value) for value in values]
    assert len(set(allowed)) == 2, "the values tell nothing"


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_honoured_or_refused(name: str) -> None:
    schema = {"type": "string", "format": name}
    if name in GOOD_FORMATS:
        assert accepts(schema, GOOD_FORMATS[name])
        assert not accepts(schema, "\u0001 no such thing \u0001")
    else:
        with pytest.raises(ValueError, match=f"Unknown format: {name}"):
            accepts(schema, "x")
