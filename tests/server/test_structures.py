"""What a request says its output must be: each field becomes one of few structures, or is refused by name."""

import json
from typing import Any

import pytest

from tests.server.conftest import Server
from toppings.sampling_params import Structure, StructureKind

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
JSON_SCHEMA = Structure(StructureKind.JSON_SCHEMA, json.dumps(SCHEMA))
OBJECT = Structure(StructureKind.JSON_OBJECT)
ANY_OBJECT = Structure(StructureKind.JSON_SCHEMA, '{"type": "object"}')
CHOICE = Structure(StructureKind.CHOICE, '["a","b"]')
REGEX = Structure(StructureKind.REGEX, "[a-c]+")
GRAMMAR = Structure(StructureKind.GRAMMAR, 'start: "a"')


def json_format(schema: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}


ASKED: list[tuple[dict[str, Any], Structure | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": None, "structured_outputs": None, "guided_json": None}, None),
    ({"structured_outputs": {}}, None),
    ({"structured_outputs": {"json_object": False}}, None),
    ({"response_format": {"type": "json_object"}}, OBJECT),
    ({"response_format": json_format()}, JSON_SCHEMA),
    ({"response_format": json_format(strict=True, description="what it is")}, JSON_SCHEMA),
    ({"structured_outputs": {"json": SCHEMA}}, JSON_SCHEMA),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, JSON_SCHEMA),
    ({"structured_outputs": {"json_object": True}}, OBJECT),
    ({"structured_outputs": {"regex": "[a-c]+"}}, REGEX),
    ({"structured_outputs": {"choice": ["a", "b"]}}, CHOICE),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, GRAMMAR),
    ({"guided_json": SCHEMA}, JSON_SCHEMA),
    ({"guided_json": json.dumps(SCHEMA)}, JSON_SCHEMA),
    ({"guided_regex": "[a-c]+"}, REGEX),
    ({"guided_choice": ["a", "b"]}, CHOICE),
    ({"guided_grammar": 'start: "a"'}, GRAMMAR),
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "structural_tag"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "needs json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "needs json_schema.schema"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}, "takes no json_schema"),
    ({"response_format": json_format(schema=[1])}, "schema"),
    ({"response_format": json_format(strict="yes")}, "strict"),
    ({"response_format": json_format({"uniqueItems": True})}, "uniqueItems"),
    ({"response_format": json_format({"type": "nothing"})}, "response_format: the json_schema cannot"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
    ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex: the regex cannot"),
    (
        {"structured_outputs": {"regex": "a", "choice": ["b"]}},
        "structured_outputs.regex and structured_outputs.choice",
    ),
    ({"guided_json": SCHEMA, "response_format": {"type": "json_object"}}, "response_format and guided_json"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_regex and guided_choice"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": [1]}, "guided_choice"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_regex": "a" * 300_000}, "300000 characters"),
    ({"guided_grammar": "nonsense"}, "guided_grammar"),
    ({"guided_grammar": "start: <[5]> <[512]>"}, "token id 512; the vocabulary has ids 0 to 511"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
]


@pytest.mark.parametrize(("body", "structure"), ASKED)
async def test_each_field_asks_for_a_structure(
    server: Server, body: dict[str, Any], structure: Structure | None
) -> None:
    reply = await server.complete(**body, n=2, max_tokens=1)
    assert reply.status_code == 200
    messages = [{"role": "user", "content": "hi"}]
    reply = await server.post("/v1/chat/completions", messages=messages, max_tokens=1, **body)
    assert reply.status_code == 200
    assert len(server.engine.calls) == 3
    for call in server.engine.calls:
        assert same(call.sampling.structure, structure)


def same(given: Structure | None, expected: Structure | None) -> bool:
    if given is None or expected is None or given.kind != StructureKind.JSON_SCHEMA:
        return given == expected
    return given.kind == expected.kind and json.loads(given.text) == json.loads(expected.text)


@pytest.mark.parametrize(("body", "named"), REFUSED)
async def test_what_cannot_be_asked_for_is_refused_by_name(
    server: Server, body: dict[str, Any], named: str
) -> None:
    reply = await server.complete(**body)
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]
    assert not server.engine.calls


async def test_strict_false_ignores_what_is_not_supported(server: Server) -> None:
    schema = {**SCHEMA, "not": {"required": ["b"]}, "x-guidance": {"whitespace_flexible": False}}
    reply = await server.complete(response_format=json_format(schema, strict=False), max_tokens=1)
    assert reply.status_code == 200
    [call] = server.engine.calls
    assert call.sampling.structure is not None
    options = json.loads(call.sampling.structure.text)["x-guidance"]
    assert options == {"whitespace_flexible": False, "lenient": True}


LORAX: list[tuple[dict[str, Any], Structure]] = [
    ({"grammar": {"type": "json", "value": SCHEMA}}, JSON_SCHEMA),
    ({"grammar": {"type": "json", "value": json.dumps(SCHEMA)}}, JSON_SCHEMA),
    ({"grammar": {"type": "regex", "value": "[a-c]+"}}, REGEX),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, JSON_SCHEMA),
    (
        {"response_format": {"type": "json_object"}},
        Structure(StructureKind.JSON_SCHEMA, '{"type": "object"}'),
    ),
]


@pytest.mark.parametrize(("parameters", "structure"), LORAX)
async def test_loraxs_parameters_ask_for_a_structure(
    server: Server, parameters: dict[str, Any], structure: Structure
) -> None:
    reply = await server.post("/generate", inputs="hi", parameters={"max_new_tokens": 1, **parameters})
    assert reply.status_code == 200, reply.text
    [call] = server.engine.calls
    assert same(call.sampling.structure, structure)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"grammar": {"type": "yaml", "value": "x"}}, "grammar"),
        ({"grammar": {"type": "regex", "value": {}}}, "grammar.value"),
        ({"grammar": {"type": "regex", "value": "["}}, "grammar: the regex cannot"),
        (
            {"grammar": {"type": "regex", "value": "a"}, "response_format": {"type": "json_object"}},
            "together",
        ),
    ],
)
async def test_loraxs_parameters_are_refused_by_name(
    server: Server, parameters: dict[str, Any], named: str
) -> None:
    reply = await server.post("/generate", inputs="hi", parameters={"adapter_source": "local", **parameters})
    assert reply.status_code == 422
    assert named in reply.json()["error"]
    assert not server.engine.calls
