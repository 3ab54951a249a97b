"""The routes, a good body for each, and every field that is known of it."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toppings.server import lightllm, lorax
from toppings.server.protocol import HARMLESS, NEUTRAL

JSON = "application/json"
ITEM = "[]"
"""In the path of a field: the one item of a list."""
MAX_TOKENS = 4
MESSAGES = [{"role": "system", "content": "You answer."}, {"role": "user", "content": "Hello."}]
LORAX = {"max_new_tokens": MAX_TOKENS, "adapter_id": "haiku"}


@dataclass(frozen=True)
class Route:
    """`good` is a body that is served; `schema`, beside it, names all fields that the body may have."""

    method: str
    path: str
    good: dict[str, Any]
    schema: dict[str, Any]

    def fields(self) -> list[tuple[str, ...]]:
        """Each field of the body as the path to it, first element first; unknown ones, too."""
        known = list(dict.fromkeys((*_fields_of(self.schema, self.schema), *((name,) for name in self.good))))
        return [*known, ("unknown_field",)]


def known_routes(document: dict[str, Any], adapter_path: str = "nowhere") -> list[Route]:
    """Every route that takes a body: those of the OpenAPI `document`, and `/generate`, whose two families
    of bodies share a route. Loading is asked for `adapter_path`."""
    routes = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get(JSON)
            if body is not None and not path.startswith("/generate"):
                schema = {**body["schema"], "components": document.get("components", {})}
                routes.append(Route(method.upper(), path, _good_body(path, adapter_path), schema))
    for path in ("/generate", "/generate_stream"):
        good = {"inputs": "Hello.", "parameters": LORAX}
        routes.append(Route("POST", path, good, _schema_of(lorax.Body)))
        light = {"inputs": "Hello.", "parameters": {"max_new_tokens": MAX_TOKENS}, "lora_dir": "haiku"}
        routes.append(Route("POST", path, light, _schema_of(lightllm.Body)))
    return routes


def _good_body(path: str, adapter_path: str) -> dict[str, Any]:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"model": "pirate", "prompt": "Hello.", "max_tokens": MAX_TOKENS},
        "/v1/chat/completions": {"model": "toppings-demo", "messages": MESSAGES, "max_tokens": MAX_TOKENS},
        "/v1/responses": {"model": "pirate", "input": MESSAGES, "max_output_tokens": MAX_TOKENS},
        "/v1/messages": {"model": "pirate", "messages": MESSAGES[1:], "max_tokens": MAX_TOKENS},
        "/v1/messages/count_tokens": {"model": "pirate", "messages": MESSAGES[1:]},
        "/tokenize": {"model": "pirate", "prompt": "Hello."},
        "/detokenize": {"model": "pirate", "tokens": [1, 2, 3]},
        "/adapters": {"name": "odd", "src": adapter_path},
    }
    if path not in bodies and "unload" in path:
        return {"lora_name": "odd"}
    if path not in bodies and "load" in path:
        return {"lora_name": "odd", "lora_path": adapter_path}
    return bodies.get(path, {})


def _schema_of(model: Any) -> dict[str, Any]:
    schema: dict[str, Any] = model.model_json_schema()
    return schema


def _fields_of(schema: dict[str, Any], root: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    schema = _resolved(schema, root)
    for name, inner in schema.get("properties", {}).items():
        yield (name,)
        yield from ((name, *rest) for rest in _fields_of(inner, root))
    for option in schema.get("anyOf", ()):
        yield from _fields_of(option, root)
    if "items" in schema:
        yield from ((ITEM, *rest) for rest in _fields_of(schema["items"], root))
    if "prompt" in schema.get("properties", {}) or "messages" in schema.get("properties", {}):
        yield from ((name,) for name in sorted((*NEUTRAL, *HARMLESS)))


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    found: Any = root
    for part in reference.removeprefix("#/").split("/"):
        found = found[part]
    return dict(found)


def with_value(good: dict[str, Any], field: tuple[str, ...], text: str) -> str:
    """The JSON text of `good` with `field` set to the JSON `text`, whatever that is."""
    marker = "\u0001here\u0001"
    copy = json.loads(json.dumps(good))
    place: Any = copy
    for name, following in itertools.pairwise(field):
        wanted = list if following == ITEM else dict
        if name == ITEM:
            place[:] = place[-1:] if place and isinstance(place[-1], wanted) else [wanted()]
            place = place[0]
        else:
            if not isinstance(place.get(name), wanted):
                place[name] = wanted()
            place = place[name]
    place[field[-1]] = marker
    return json.dumps(copy).replace(json.dumps(marker), text)
