"""Bounds in bytes and time on what a request brings, before any route looks at it."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toppings.bad_input import shown
from toppings.server.errors import ApiError, error_response, unavailable

MIN_BODY_LIMIT = 4 * 2**20
BODY_BYTES_PER_TOKEN = 64
"""Of the model's context, for a body of one or a few prompts: JSON may take 12 bytes for one character."""
BODIES_AT_ONCE = 8
"""Bodies of the largest size that may be on their way together; more are told to come back."""
MAX_DISCARDED_BYTES = 64 * 2**20
DISCARD_PAUSE_S = 0.5
"""A client that has sent nothing for so long waits for its answer."""
BODY_TIMEOUT_FACTOR = 10
"""A whole body may take so many times as long as one pause in it."""
MAX_URL_BYTES = 16 * 2**10
MAX_HEAD_BYTES = 64 * 2**10


def body_limit(max_body_bytes: int, max_model_len: int) -> int:
    """Bytes of the largest body: the setting, or (0) what a prompt as long as the model's context needs."""
    return max_body_bytes or max(MIN_BODY_LIMIT, BODY_BYTES_PER_TOKEN * max_model_len)


class BoundsMiddleware:
    """400, 408, 413, 414, 415 or 431 for what is too large, too slow or no text; 503 for too much at once."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._timeout_s = timeout_s
        self._num_held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            _check_url(scope)
            _check_headers(scope["headers"], self._max_body_bytes)
        except ApiError as error:
            await self._discard(scope, receive)
            await error_response(error)(scope, receive, send)
            return
        async with self._bounded(scope, receive) as bounded:
            await self._app(scope, bounded, send)

    @asynccontextmanager
    async def _bounded(self, scope: Scope, receive: Receive) -> AsyncIterator[Receive]:
        """`receive` with the body's bytes counted, alone and together with the other unfinished bodies."""
        num_bytes, started_at, is_whole = 0, time.monotonic(), False

        def count(num_new: int) -> None:
            nonlocal num_bytes
            num_bytes += num_new
            self._num_held_bytes += num_new

        async def bounded() -> Message:
            nonlocal is_whole
            if is_whole:
                return await receive()
            message = await self._in_time(receive, started_at)
            count(len(message.get("body", b"")))
            if num_bytes > self._max_body_bytes:
                if message.get("more_body", False):
                    await self._discard(scope, receive)
                raise too_large(self._max_body_bytes)
            if self._num_held_bytes > BODIES_AT_ONCE * self._max_body_bytes:
                raise unavailable(
                    "the bodies of requests on their way fill the memory for them; try again later"
                )
            is_whole = not message.get("more_body", False)
            if is_whole:
                count(-num_bytes)
            return message

        try:
            yield bounded
        finally:
            count(-num_bytes)

    async def _discard(self, scope: Scope, receive: Receive) -> None:
        """Read on for a while: a client that sends into a closed connection may miss the answer."""
        num_bytes, started_at = 0, time.monotonic()
        if any(name == b"expect" for name, _ in scope["headers"]):  # it waits for leave to send
            return
        with suppress(ApiError):
            while num_bytes < MAX_DISCARDED_BYTES:
                message = await self._in_time(receive, started_at, DISCARD_PAUSE_S)
                num_bytes += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return

    async def _in_time(self, receive: Receive, started_at: float, max_pause_s: float = math.inf) -> Message:
        left_s = started_at + BODY_TIMEOUT_FACTOR * self._timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(min(self._timeout_s, max_pause_s, left_s)):
                return await receive()
        except TimeoutError:
            raise ApiError(
                408,
                f"the request's body did not come: it may pause for {self._timeout_s:g} s,"
                f" and take {BODY_TIMEOUT_FACTOR * self._timeout_s:g} s",
                headers={"Connection": "close"},
            ) from None


def too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"the request's body is too large; at most {max_bytes} bytes are read")


def _check_url(scope: Scope) -> None:
    path, query = scope.get("raw_path") or scope["path"].encode(), scope.get("query_string", b"")
    if len(path) + len(query) > MAX_URL_BYTES:
        raise ApiError(
            414,
            f"the URL has {len(path) + len(query)} bytes; at most {MAX_URL_BYTES} are read",
        )
    for name, part in (("path", path), ("query", query)):
        _check_text(f"the URL's {name}", unquote_to_bytes(part), part)


def _check_text(name: str, content: bytes, sent: bytes) -> None:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"{name} is not UTF-8: {shown(sent.decode('latin-1'))!r}: {error.reason}"
        ) from None
    if "\0" in text:
        raise ApiError(400, f"{name} holds a null character: {shown(sent.decode('latin-1'))!r}")


def _check_headers(headers: list[tuple[bytes, bytes]], max_body_bytes: int) -> None:
    num_bytes = sum(len(name) + len(value) for name, value in headers)
    if num_bytes > MAX_HEAD_BYTES:
        raise ApiError(431, f"the headers have {num_bytes} bytes; at most {MAX_HEAD_BYTES} are read")
    for name, value in headers:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise ApiError(
                415,
                f"Content-Encoding is {shown(value.decode('latin-1'))!r}; send the body as it is",
            )
        if name == b"content-length" and value.isdigit() and int(value[:32]) > max_body_bytes:
            raise too_large(max_body_bytes)
