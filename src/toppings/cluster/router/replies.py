"""The router's own answers: errors in the shapes that clients of these routes know."""

from typing import Any

import msgspec
from aiohttp import web

from toppings.cluster.router.exchange import current_exchange
from toppings.exchanges.exchange import MESSAGES
from toppings.tenants.refusals import Refusal

EVENT_STREAM = "text/event-stream"
MAX_TOLD_LEN = 200


class ApiError(Exception):
    """An answer with `status` and the usual error object; `kind` is its `type`."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "BadRequestError",
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.headers = status, kind, param, headers or {}
        self.code = code

    def response(self, path: str = "") -> web.Response:
        """In the dialect of the route at `path`."""
        if (exchange := current_exchange.get()) is not None:
            exchange.error = str(self)
        body = error_body(self.status, str(self), self.kind, self.param, self.code)
        if path.startswith(MESSAGES):
            body = message_error(self.status, str(self))
        return json_response(body, self.status, self.headers)

    @classmethod
    def of(cls, refusal: Refusal) -> "ApiError":
        return cls(
            refusal.status,
            refusal.message,
            refusal.kind,
            param=refusal.param,
            headers=refusal.headers,
            code=refusal.code,
        )


MESSAGE_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def message_error(status: int, message: str) -> dict[str, Any]:
    """Anthropic's form."""
    kind = MESSAGE_KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    exchange = current_exchange.get()
    told = {} if exchange is None else {"request_id": exchange.request_id}
    return {"type": "error", "error": {"type": kind, "message": message}, **told}


def error_body(
    status: int, message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code or status}}


def json_response(content: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    body = msgspec.json.encode(content)
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


def bad_gateway(message: str) -> ApiError:
    """Servers answered with what is no answer."""
    return ApiError(502, message, "UpstreamError")


def out_of_time(message: str, retry_after_s: int) -> ApiError:
    return ApiError(504, message, "UpstreamTimeoutError", headers={"Retry-After": str(retry_after_s)})


def unavailable(message: str, retry_after_s: int) -> ApiError:
    return ApiError(503, message, "ServiceUnavailableError", headers={"Retry-After": str(retry_after_s)})


def out_of_objective(message: str, retry_after_s: int) -> ApiError:
    headers = {"Retry-After": str(retry_after_s)}
    return ApiError(429, message, "rate_limit_error", headers=headers, code="slo_unattainable")


def unknown_model(model: str, aliases: list[str]) -> ApiError:
    """A name of any length may have been asked for; its beginning is told."""
    told = model if len(model) <= MAX_TOLD_LEN else f"{model[:MAX_TOLD_LEN]}..."
    known = " and ".join([*([", ".join(aliases)] if aliases else []), "what GET /v1/models lists"])
    text = f"The model `{told}` does not exist. Valid aliases: {known}."
    return ApiError(404, text, "NotFoundError", param="model")


def stream_error(path: str, message: str, *, is_between_events: bool) -> bytes:
    """The event that ends a stream whose server failed, in the dialect of the route."""
    start = b"" if is_between_events else b"\n\n"
    if path == "/generate_stream":
        return (
            start + b"data:" + msgspec.json.encode({"error": message, "error_type": "generation"}) + b"\n\n"
        )
    body = error_body(502, message, "UpstreamError")
    name = b""
    if path == MESSAGES:
        name, body = b"event: error\n", message_error(502, message)
    elif path == "/v1/responses":
        name, told = b"event: error\n", {"code": "502", "message": message, "param": None}
        body = {"type": "error", **told, **body}
    return start + name + b"data: " + msgspec.json.encode(body) + b"\n\n"
