"""JSON bodies: bounded in values and depth before any object is made of them; 400 for what is no JSON."""

import json
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from toppings.access import JSON_TYPE, why_not_json
from toppings.bad_input import RequestError, check_unicode, shown
from toppings.exchanges.exchange import CLIENT_GONE
from toppings.server.errors import ApiError, field_at
from toppings.server.exchange import current_exchange

MAX_ITEMS = 1 << 18
"""Values of one body; reading as many takes tens of milliseconds."""
MAX_TEXTS = 1 << 14
"""Strings of one body, names of fields included."""
MAX_DEPTH = 32
MAX_MODEL_CHARS = 256
"""Of the model's name, as it is logged."""
BRACKETS = re.compile(rb"[\[\]{}]")
HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRequest(Request):
    """A request whose body has been read and checked by `read_json`."""

    content: Any

    async def json(self) -> Any:
        return self.content


class JsonRoute(APIRoute):
    """A route that reads JSON under whatever content type it comes, within the bounds of this module."""

    needs_content_type = False

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def checked(request: Request) -> Response:
            if self.needs_content_type:
                check_content_type(request)
            try:
                content = await read_json(request)
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            headers = [each for each in request.scope["headers"] if each[0] != b"content-type"]
            scope = {**request.scope, "headers": [*headers, (b"content-type", JSON_TYPE.encode())]}
            wrapped = JsonRequest(scope, request.receive)
            wrapped._body, wrapped.content = b"{}", content
            return await handle(wrapped)

        return checked


class TypedJsonRoute(JsonRoute):
    """A `JsonRoute` that changes state: no web page may send its body unasked (`why_not_json`)."""

    needs_content_type = True


def _model_in(content: Any) -> str:
    """Which model a body asks for, in each dialect's word for it; "" where it names none. For the log of what
    is refused: what is served goes by the name that was found."""
    body = content if isinstance(content, dict) else {}
    parameters = body.get("parameters")
    inner = parameters if isinstance(parameters, dict) else {}
    names = (body.get("model"), body.get("lora_dir"), inner.get("adapter_id"))
    return next((shown(name, MAX_MODEL_CHARS) for name in names if isinstance(name, str)), "")


def check_content_type(request: Request) -> None:
    """Raises ApiError 400."""
    headers = request.headers
    has_key = request.app.state.toppings.config.server.asks_for_keys
    reason = why_not_json(headers.get("content-type", ""), headers.keys(), has_key=has_key)
    if reason is not None:
        raise ApiError(400, f"1 validation error:\n  body: {reason}")


async def read_json(request: Request) -> Any:
    """The body as JSON; notes the model that it asks for. Raises ApiError 400; ClientDisconnect where the
    client leaves before its end."""
    content = parse(await request.body())
    if (exchange := current_exchange.get()) is not None:
        exchange.model = _model_in(content)
    return content


def parse(body: bytes) -> Any:
    """JSON as RFC 8259 has it (no NaN, no infinity, UTF-8 only). Raises ApiError 400 naming what is wrong."""
    _check_size(body)
    try:
        content = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise _invalid(f"it is not UTF-8: {error.reason} {error.object[error.start]:#04x}") from None
    except (ValueError, RecursionError) as error:
        _name_bad_unicode(body)
        raise _invalid(shown(str(error).partition(" - at ")[0])) from None
    return content


def _invalid(reason: str) -> ApiError:
    return ApiError(400, f"1 validation error:\n  body: it is no valid JSON: {reason}")


def _check_size(body: bytes) -> None:
    """Counts marks outside of strings, with what runs through megabytes in milliseconds."""
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    num_texts = unescaped.count(b'"') // 2
    if num_texts > MAX_TEXTS:
        raise _too_large(f"it holds {num_texts} strings; at most {MAX_TEXTS} are read")
    marks = b"".join(unescaped.split(b'"')[::2])
    num_items = marks.count(b",") + 1
    if num_items > MAX_ITEMS:
        raise _too_large(f"it holds {num_items} values; at most {MAX_ITEMS} are read")
    _check_depth(b"".join(BRACKETS.findall(marks)))


def _check_depth(brackets: bytes) -> None:
    """Takes out what opens and closes with nothing between, layer by layer."""
    brackets = brackets.translate(bytes.maketrans(b"{}", b"[]"))
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    if b"[" * (MAX_DEPTH + 1) in brackets or b"[]" in brackets:
        raise _too_large(f"its lists and objects are more than {MAX_DEPTH} deep")


def _too_large(reason: str) -> ApiError:
    return ApiError(400, f"1 validation error:\n  body: {reason}")


def _name_bad_unicode(body: bytes) -> None:
    """Of a body that was refused: halves of UTF-16 pairs, as texts cut in JavaScript or Java end in, with the
    field that holds one."""
    if HALF_PAIR.search(body) is None:
        return
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return
    for place, text in _texts(content, "body"):
        try:
            check_unicode(place, text)
        except RequestError as error:
            raise ApiError(400, f"1 validation error:\n  {error}", param=field_at(place)) from None


def _texts(content: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every string with its place, keys included."""
    if isinstance(content, str):
        yield place, content
    elif isinstance(content, list):
        for index, value in enumerate(content):
            if not isinstance(value, int):
                yield from _texts(value, f"{place}.{index}")
    elif isinstance(content, dict):
        for key, value in content.items():
            yield f"a field's name in {place}", key
            yield from _texts(value, f"{place}.{shown(key, 64)}")
