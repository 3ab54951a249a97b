"""The OpenAPI document says what the server does: answers fit their schemas, every route has its statuses."""

import json
import re
from typing import Any

import jsonschema
import pytest

from tests.server.conftest import Server
from toppings.server.openapi import EXAMPLES, answer_models
from toppings.server.schemas import openai, others

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
ANSWERS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/v1/completions", {"prompt": "hi", "logprobs": 2, "n": 2, "return_token_ids": True}),
    ("POST", "/v1/completions", {"prompt": "hi"}),
    ("POST", "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
    ("POST", "/v1/chat/completions", {**CHAT, "return_token_ids": True, "max_tokens": 3}),
    ("POST", "/v1/responses", {"input": "hi"}),
    ("POST", "/v1/messages", {**CHAT, "model": "base", "max_tokens": 3}),
    ("POST", "/v1/messages/count_tokens", {**CHAT, "model": "base"}),
    ("POST", "/tokenize", {"prompt": "hi", "return_token_strs": True}),
    ("POST", "/detokenize", {"tokens": [70]}),
    ("POST", "/generate", {"inputs": "hi", "parameters": {"details": True}}),
    ("POST", "/generate", {"inputs": "hi", "parameters": {"return_details": True}, "lora_dir": None}),
    ("POST", "/load_lora_adapter", {"lora_name": "b", "lora_path": "adapter-00001"}),
    *(
        ("GET", path, None)
        for path in ("/v1/models", "/adapters", "/health", "/ready", "/ping", "/version", "/stats")
    ),
]
REFUSED: list[tuple[str, str, dict[str, Any] | None, int]] = [
    ("POST", "/v1/completions", {}, 400),
    ("POST", "/v1/completions", {"prompt": "hi", "model": "nobody"}, 404),
    ("POST", "/v1/responses", {}, 400),
    ("POST", "/v1/messages", {}, 400),
    ("POST", "/generate", {}, 422),
    ("POST", "/generate", {"inputs": 1, "lora_dir": "x"}, 400),
    ("POST", "/tokenize", {}, 400),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "b", "lora_path": "nowhere"}, 404),
    ("POST", "/load_lora_adapter", {"lora_name": "b", "lora_path": "nowhere"}, 400),
]


@pytest.fixture
def document(server: Server) -> dict[str, Any]:
    return server.app.openapi()


def check(document: dict[str, Any], path: str, method: str, reply: Any) -> None:
    said = document["paths"][path][method.lower()]["responses"][str(reply.status_code)]["content"]
    kind = reply.headers["content-type"].partition(";")[0]
    schema = {**said[kind]["schema"], "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(reply.json())


@pytest.mark.parametrize(("method", "path", "body"), ANSWERS, ids=str)
async def test_answers_fit(
    server: Server, document: dict[str, Any], method: str, path: str, body: dict[str, Any] | None
) -> None:
    server.registry.register("a", server.state.config.server.adapters + "/adapter-00000")
    reply = await server.http.request(method, path, json=body)
    assert reply.status_code == 200, reply.text
    check(document, path, method, reply)


@pytest.mark.parametrize(("method", "path", "body", "status"), REFUSED, ids=str)
async def test_refusals_fit(
    server: Server,
    document: dict[str, Any],
    method: str,
    path: str,
    body: dict[str, Any] | None,
    status: int,
) -> None:
    reply = await server.http.request(method, path, json=body)
    assert reply.status_code == status, reply.text
    check(document, path, method, reply)


@pytest.mark.parametrize(
    ("path", "body", "schema"),
    [
        ("/v1/completions", {"prompt": "hi", "logprobs": 1}, openai.Completion),
        ("/v1/chat/completions", {**CHAT, "return_token_ids": True}, openai.ChatCompletionChunk),
        ("/v1/responses", {"input": "hi"}, openai.ResponseEvent),
        ("/v1/messages", {**CHAT, "model": "base", "max_tokens": 3}, others.MessageEvent),
        ("/generate", {"inputs": "hi", "parameters": {}}, others.GenerateEvent),
    ],
)
async def test_events_fit(
    server: Server, document: dict[str, Any], path: str, body: dict[str, Any], schema: type
) -> None:
    said = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    assert schema.__name__ in said["schema"]["description"]
    reply = await server.post(path, **body, stream=True)
    events = [json.loads(each) for each in re.findall(r"^data: ?(\{.*)$", reply.text, re.MULTILINE)]
    assert events
    reference = {"$ref": f"#/components/schemas/{schema.__name__}", "components": document["components"]}
    for event in events:
        jsonschema.Draft202012Validator(reference).validate(event)


def test_every_operation_has_its_answers_and_errors(server: Server, document: dict[str, Any]) -> None:
    paths = {re.sub(r":path", "", getattr(route, "path", "")) for route in server.app.state.routes}
    hidden = {"/openapi.json", "/docs", "/docs/{asset}"}
    hidden |= {path for path in paths if path.startswith("/dashboard")}
    assert {path.replace(":path", "") for path in document["paths"]} == paths - hidden
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = operation["responses"]
            assert {"200", "400", "500"} <= responses.keys(), (method, path)
            assert all(each["content"] for each in responses.values())
            if "requestBody" in operation:
                assert operation["requestBody"]["content"]["application/json"]["example"] == EXAMPLES[path]
                assert {"408", "413", "415"} <= responses.keys()


def test_examples_fit_their_bodies(document: dict[str, Any]) -> None:
    for path, example in EXAMPLES.items():
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(example)


def test_the_document_is_one_that_tools_read(document: dict[str, Any]) -> None:
    import schemathesis  # not while tests are collected: it takes a second

    operations = list(schemathesis.openapi.from_dict(document).get_all_operations())
    assert [each.ok().label for each in operations]
    text = json.dumps(document)
    for name in set(re.findall(r'"#/components/schemas/([^"]+)"', text)):
        assert name in document["components"]["schemas"]


def test_schemas_of_answers_hide_none_of_bodies(server: Server) -> None:
    names = {each.__name__ for each in answer_models()}
    used = {each.__name__ for each in _models_of_bodies(server)}
    assert not names & used


def _models_of_bodies(server: Server) -> set[type]:
    """All classes that bodies are made of."""
    from pydantic import BaseModel

    found: set[type] = set()

    answers = answer_models()

    def walk(kind: type[BaseModel]) -> None:
        for each in (*kind.__subclasses__(),):
            if each.__module__.startswith("toppings.server") and each not in answers:
                found.add(each)
            walk(each)

    walk(BaseModel)
    return found


class TestWithAKey:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"api_key": "secret"}

    def test_it_is_asked_for(self, server: Server) -> None:
        document = server.app.openapi()
        assert document["security"] == [{"bearer": []}, {"key": []}]
        assert document["components"]["securitySchemes"].keys() == {"bearer", "key"}
        assert document["paths"]["/health"]["get"]["security"] == [{}]
        assert "401" in document["paths"]["/v1/completions"]["post"]["responses"]

    async def test_a_missing_one_is_told_as_documented(self, server: Server) -> None:
        for path in ("/v1/completions", "/v1/messages"):
            reply = await server.post(path)
            assert reply.status_code == 401
            check(server.app.openapi(), path, "POST", reply)


def test_without_a_key_none_is_needed(document: dict[str, Any]) -> None:
    assert {} in document["security"]


async def test_docs_need_nothing_from_outside(server: Server) -> None:
    page = await server.http.get("/docs")
    assert page.status_code == 200
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert links
    assert not [link for link in links if "//" in link]
    for link in links:
        reply = await server.http.get("/" + link)
        assert (reply.status_code, len(reply.content) > 1000) == (200, True)
    assert (await server.http.get("/docs/..%2fopenapi.py")).status_code == 404
    assert "url: 'openapi.json'" in page.text
