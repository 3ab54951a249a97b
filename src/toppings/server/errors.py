"""What can go wrong, and how the API says so."""

import logging
from dataclasses import dataclass, field
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from toppings.adapters.errors import AdapterError, StateError, StateFullError
from toppings.core import RequestError
from toppings.engine.client import EngineDeadError
from toppings.text import GenerationCutError, GenerationError

logger = logging.getLogger(__name__)

PLAIN_STATUSES = (404, 405)
"""Unknown routes and wrong methods keep the framework's `{"detail": ...}`, as vLLM's clients know it."""


@dataclass
class ApiError(Exception):
    """An answer with `status` and the usual error object; `kind` is its `type`."""

    status: int
    message: str
    kind: str = "BadRequestError"
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}


def json_response(content: object, status: int = 200, *, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body(), error.status, headers=error.headers)


KINDS: tuple[tuple[type[Exception], int, str], ...] = (
    (RequestError, 400, "BadRequestError"),
    (AdapterError, 400, "BadRequestError"),
    (StateFullError, 507, "InsufficientStorageError"),
    (StateError, 503, "ServiceUnavailableError"),
    (EngineDeadError, 500, "EngineDeadError"),
    (GenerationCutError, 503, "ServiceUnavailableError"),
    (GenerationError, 500, "InternalServerError"),
)
"""Status and type of exceptions whose message is meant for the client; the first that fits counts."""


def describe(error: BaseException) -> ApiError:
    """The API's answer to any exception; an unforeseen one is logged and told without its details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    for exception, status, kind in KINDS:
        if isinstance(error, exception):
            return ApiError(status, str(error), kind)
    logger.error("a request failed for an unforeseen reason", exc_info=error)
    return ApiError(500, "the server failed; its log says why", "InternalServerError")


def _invalid(error: RequestValidationError) -> ApiError:
    problems = [(".".join(str(part) for part in each["loc"]), each["msg"]) for each in error.errors()]
    lines = "".join(f"\n  {place}: {message}" for place, message in problems)
    noun = "validation error" if len(problems) == 1 else "validation errors"
    is_field = problems[0][0].startswith("body.") and error.errors()[0]["type"] != "json_invalid"
    return ApiError(
        400, f"{len(problems)} {noun}:{lines}", "Bad Request", problems[0][0] if is_field else None
    )


def install_error_handlers(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        return error_response(describe(error))

    async def handle_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code in PLAIN_STATUSES:
            return json_response(
                {"detail": error.detail}, error.status_code, headers=dict(error.headers or {})
            )
        return error_response(ApiError(error.status_code, str(error.detail), "Bad Request"))

    for kind in (ApiError, ValueError, RuntimeError, RequestValidationError, Exception):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(HTTPException, handle_http)
