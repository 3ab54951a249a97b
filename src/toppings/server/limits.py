"""A bound on what a request's body may hold."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toppings.server.errors import ApiError, error_response

MAX_BODY_BYTES = 32 * 2**20
TOO_LARGE = f"the request's body is too large; at most {MAX_BODY_BYTES} bytes are read"


class BodyLimitMiddleware:
    """413 for a body above `MAX_BODY_BYTES`, announced or counted as it comes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
            await error_response(ApiError(413, TOO_LARGE, "Bad Request"))(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, TOO_LARGE)
            return message

        await self._app(scope, counted, send)
