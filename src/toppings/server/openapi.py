"""The OpenAPI document, and `/docs`: FastAPI knows routes and bodies, here are answers, errors and keys."""

from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from toppings.server import lightllm, lorax
from toppings.server.auth import OPEN_PATHS
from toppings.server.schemas import administration, openai, others, shared

router = APIRouter(include_in_schema=False)

STATIC = Path(fastapi_offline.__file__).parent / "static"
ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")
JSON, STREAM, TEXT = "application/json", "text/event-stream", "text/plain"
REF = "#/components/schemas/{model}"

CHAT = [{"role": "user", "content": "Hello."}]
GENERATE = (others.LoraxAnswer, others.LightllmAnswer)
Models = tuple[type[BaseModel], ...]
ANSWERS: dict[str, tuple[Models, type[BaseModel] | None]] = {
    "POST /v1/completions": ((openai.Completion,), openai.Completion),
    "POST /v1/chat/completions": ((openai.ChatCompletion,), openai.ChatCompletionChunk),
    "POST /v1/responses": ((openai.ResponseObject,), openai.ResponseEvent),
    "POST /v1/messages": ((others.MessageObject,), others.MessageEvent),
    "POST /v1/messages/count_tokens": ((others.TokenCount,), None),
    "POST /generate": (GENERATE, others.GenerateEvent),
    "POST /generate_stream": ((), others.GenerateEvent),
    "POST /v1/embeddings": ((openai.EmbeddingList,), None),
    "POST /v1/score": ((openai.ScoreList,), None),
    "POST /score": ((openai.ScoreList,), None),
    "POST /tokenize": ((others.Tokens,), None),
    "POST /detokenize": ((others.Prompt,), None),
    "GET /v1/models": ((openai.ModelList,), None),
    "GET /v1/models/{name}": ((openai.ModelCard,), None),
    "GET /adapters": ((administration.AdapterList,), None),
    "POST /adapters/{name}/pin": ((administration.Pin,), None),
    "DELETE /adapters/{name}/pin": ((administration.Pin,), None),
    "POST /adapters/{name}/prefetch": ((administration.Prefetch,), None),
    "POST /load_lora_adapter": ((administration.SglangAnswer,), None),
    "POST /unload_lora_adapter": ((administration.SglangAnswer,), None),
    **{f"GET {path}": ((shared.Status,), None) for path in ("/health", "/healthz", "/ready", "/ping")},
    "POST /ping": ((shared.Status,), None),
    "GET /version": ((shared.Version,), None),
    "GET /stats": ((administration.Stats,), None),
    "GET /cold_starts": ((administration.ColdStarts,), None),
}
"""What a 200 holds: one of these as JSON, and the data of each event of a stream; elsewhere plain text."""

EXAMPLES: dict[str, Any] = {
    "/v1/completions": {"model": "pirate", "prompt": "The sea is", "max_tokens": 16},
    "/v1/chat/completions": {"model": "pirate", "messages": CHAT, "max_tokens": 32, "stream": True},
    "/v1/responses": {"model": "pirate", "input": "Hello.", "max_output_tokens": 32},
    "/v1/messages": {"model": "pirate", "messages": CHAT, "max_tokens": 32},
    "/v1/messages/count_tokens": {"model": "pirate", "messages": CHAT},
    "/generate": {"inputs": "The sea is", "parameters": {"adapter_id": "pirate", "max_new_tokens": 16}},
    "/generate_stream": {"inputs": "The sea is", "parameters": {"max_new_tokens": 16}, "lora_dir": "pirate"},
    "/v1/embeddings": {"model": "pirate", "input": ["The sea is", "The sky was"]},
    **{
        path: {"model": "pirate", "text_1": "The sea", "text_2": ["A wave"]}
        for path in ("/v1/score", "/score")
    },
    "/tokenize": {"model": "pirate", "prompt": "The sea is"},
    "/detokenize": {"model": "pirate", "tokens": [1, 2, 3]},
    "/adapters": {"name": "mine", "src": "mine"},
    **{
        path: {"lora_name": "mine", **({"lora_path": "mine"} if "/load" in path else {})}
        for path in (
            *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
            *("/load_lora_adapter", "/unload_lora_adapter"),
        )
    },
}

STATUSES = {
    400: "the body, a value of it, or the URL is not right; the message names it",
    401: "the key is missing or wrong",
    403: "the client may not do this",
    404: "no such model or adapter",
    408: "the body did not come in time",
    413: "the body is too large",
    414: "the URL is too long",
    415: "the body is compressed",
    422: "as 400, where LoRAX's body was sent",
    424: "as 404, where LoRAX's body was sent",
    429: "the queue is full, or a limit of the tenant reached; try again after `Retry-After` seconds",
    431: "the headers are too large",
    500: "the server failed",
    503: "no engine, or shutting down, or out of memory; try again after `Retry-After` seconds",
    507: "the server's disk is full",
}
GENERATING = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
    *("/v1/embeddings", "/v1/score", "/score", "/generate", "/generate_stream"),
)


def install(app: FastAPI) -> None:
    """`app.openapi()` gives the whole document, made once."""
    plain, has_key = app.openapi, app.state.toppings.config.server.asks_for_keys

    def whole() -> dict[str, Any]:
        if app.openapi_schema is None or "security" not in app.openapi_schema:
            app.openapi_schema = _completed(plain(), has_key=has_key)
        return app.openapi_schema

    app.openapi = whole  # type: ignore[method-assign]


def _completed(document: dict[str, Any], *, has_key: bool) -> dict[str, Any]:
    components = document.setdefault("components", {})
    components["securitySchemes"] = {
        "bearer": {
            "type": "http",
            "scheme": "bearer",
            "description": "the server's `api_key`, or one of a tenant's",
        },
        "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    document["security"] = [{"bearer": []}, {"key": []}, *([] if has_key else [{}])]
    found = {
        name: each for name, each in components.get("schemas", {}).items() if "ValidationError" not in name
    }
    components["schemas"] = {**found, **_schemas()}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete(operation, method.upper(), path)
    return document


def answer_models() -> list[type[BaseModel]]:
    """All that an answer may be, or be made of."""
    found = (value for module in (shared, openai, others, administration) for value in vars(module).values())
    models = (each for each in found if isinstance(each, type) and issubclass(each, BaseModel))
    return [each for each in dict.fromkeys(models) if each is not BaseModel]


def _schemas() -> dict[str, Any]:
    """Those of `schemas` and of the two families of `/generate`, by name."""
    models = [(each, "serialization") for each in answer_models()]
    found: dict[str, Any] = models_json_schema(models, ref_template=REF)[1].get("$defs", {})  # type: ignore[arg-type]
    for name, body in (("Lorax", lorax.Body), ("Lightllm", lightllm.Body)):
        schema = body.model_json_schema(ref_template=f"#/components/schemas/{name}{{model}}")
        inner = schema.pop("$defs", {})
        found |= {f"{name}Body": schema, **{f"{name}{each}": value for each, value in inner.items()}}
    return found


def _complete(operation: dict[str, Any], method: str, path: str) -> None:
    path = path.replace(":path", "")
    if path.startswith("/generate"):
        body = {"anyOf": [_ref("LoraxBody"), _ref("LightllmBody")]}
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": body}}}
    if "requestBody" in operation and path in EXAMPLES:
        operation["requestBody"]["content"][JSON]["example"] = EXAMPLES[path]
    if path in OPEN_PATHS:
        operation["security"] = [{}]
    operation["responses"] = {
        "200": {"description": "the answer", "headers": HEADERS, "content": _content(f"{method} {path}")},
        **{str(status): _refusal(status, path) for status in sorted(_statuses(operation, method, path))},
    }


HEADERS = {
    "X-Request-Id": {"description": "the client's, or a new one", "schema": {"type": "string"}},
    "X-Toppings-Ignored": {
        "description": "fields of the body that nobody knows, percent-encoded and parted by commas",
        "schema": {"type": "string"},
    },
}


def _content(operation: str) -> dict[str, Any]:
    models, event = ANSWERS.get(operation, ((), None))
    content: dict[str, Any] = {}
    if models:
        refs = [_ref(model.__name__) for model in models]
        content[JSON] = {"schema": refs[0] if len(refs) == 1 else {"anyOf": refs}}
    if event is not None:
        text = f"server-sent events; the `data` of each is JSON: {REF.format(model=event.__name__)}"
        content[STREAM] = {"schema": {"type": "string", "description": text}}
    return content or {TEXT: {"schema": {"type": "string"}}}


def _statuses(operation: dict[str, Any], method: str, path: str) -> set[int]:
    found = {400, 414, 431, 500, *([] if path in OPEN_PATHS else [401])}
    if "requestBody" in operation:
        found |= {404, 408, 413, 415, 503}
    if path in GENERATING:
        found.add(429)
    if path.startswith("/generate"):
        found |= {422, 424}
    if "adapter" in path and method != "GET":
        found |= {403, 404, 503, 507}
    if "{name}" in path:
        found.add(404)
    if path in (*OPEN_PATHS, "/stats"):
        found.add(503)
    return found


def _refusal(status: int, path: str) -> dict[str, Any]:
    names = ["Error"]
    if path.startswith("/v1/messages"):
        names = ["MessageError"]
    elif path.startswith("/generate"):
        names = ["LoraxError"] if status in (422, 424) else ["LoraxError", "LightllmError", "Error"]
    elif path in ("/load_lora_adapter", "/unload_lora_adapter"):
        names = ["SglangAnswer", "Error"]
    elif path in OPEN_PATHS and status == 503:
        names = ["Status", "Error"]
    refs = [_ref(name) for name in names]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {"description": STATUSES[status], "content": {JSON: {"schema": schema}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": REF.format(model=name)}


@router.get("/docs")
async def docs(request: Request) -> Response:
    app: FastAPI = request.app
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title=f"{app.title} {app.version}",
        swagger_js_url=f"docs/{ASSETS[0]}",
        swagger_css_url=f"docs/{ASSETS[1]}",
        swagger_favicon_url=f"docs/{ASSETS[2]}",
    )


@router.get("/docs/{asset}")
async def docs_asset(asset: str) -> Response:
    if asset not in ASSETS:
        return Response(status_code=404)
    return FileResponse(STATIC / asset)
