"""What can go wrong, and how the API says so."""

import errno
import logging
import re
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from toppings.adapters.errors import AdapterError, StateError, StateFullError
from toppings.bad_input import ContextLengthError, RequestError, shown
from toppings.detokenizer import GenerationCutError, GenerationError
from toppings.engine.client import EngineDeadError
from toppings.exchanges.exchange import CLIENT_GONE
from toppings.sandbox import SandboxBusyError
from toppings.server.exchange import Exchange, current_exchange, exchange_of
from toppings.server.methods import allowed_methods
from toppings.tenants.refusals import Refusal

logger = logging.getLogger(__name__)

CONTEXT_LENGTH = "context_length_exceeded"
MAX_MESSAGE_CHARS = 2000
"""Of an answer that says what was wrong: it does not send a client's megabytes back."""
MAX_PROBLEMS = 10
RETRY_AFTER_S = 1


@dataclass
class ApiError(Exception):
    """An answer with `status` and the usual error object; `kind` is its `type`, `code` what stands for the
    status where clients look for a word, `logged` what the log has in the message's place. A long message is
    cut."""

    status: int
    message: str
    kind: str = "BadRequestError"
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    code: str | None = None
    logged: str = ""

    def __post_init__(self) -> None:
        self.message = shown(self.message, MAX_MESSAGE_CHARS)
        self.param = None if self.param is None else shown(self.param)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        code = self.code or self.status
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": code}}


def json_response(content: object, status: int = 200, *, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def error_response(error: ApiError, exchange: Exchange | None = None) -> Response:
    """In the dialect of the route that was asked, in this exchange or the current one."""
    exchange = exchange or current_exchange.get()
    body = error.body()
    if exchange is not None:
        exchange.error = error.logged or error.message
    if exchange is not None and exchange.is_message:
        body = {"type": "error", "error": message_error(error), "request_id": exchange.request_id}
    return json_response(body, error.status, headers=error.headers)


def unavailable(
    message: str, kind: str = "ServiceUnavailableError", *, retry_after_s: int = RETRY_AFTER_S
) -> ApiError:
    """503: the same request may succeed in a while."""
    return ApiError(503, message, kind, headers={"Retry-After": str(retry_after_s)})


MESSAGE_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def message_error(error: ApiError) -> dict[str, str]:
    """The error as Anthropic's clients know it; one of a prompt that is too long begins as theirs do."""
    kind = MESSAGE_KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    is_long = error.code == CONTEXT_LENGTH
    return {"type": kind, "message": f"prompt is too long: {error}" if is_long else error.message}


KINDS: tuple[tuple[type[Exception], int, str], ...] = (
    (RequestError, 400, "BadRequestError"),
    (AdapterError, 400, "BadRequestError"),
    (StateFullError, 507, "InsufficientStorageError"),
    (StateError, 503, "ServiceUnavailableError"),
    (EngineDeadError, 503, "EngineDeadError"),
    (GenerationCutError, 503, "ServiceUnavailableError"),
    (SandboxBusyError, 503, "ServiceUnavailableError"),
    (GenerationError, 500, "InternalServerError"),
)
"""Status and type of exceptions whose message is meant for the client; the first that fits counts."""

FULL = (errno.ENOSPC, errno.EDQUOT)
BUSY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


NAMING = (AdapterError, OSError, EngineDeadError, GenerationError)
"""What may name files: words of the registry, a source or the engine, also where another error is around."""
_PATH = re.compile(r"""(?<![\w./-])~?/(?!/)[^\s'"`,;:()<>\[\]]+""")


def without_paths(text: str) -> str:
    """Of each absolute path its last part only, whether there is such a file or not: who asks about paths
    learns nothing from what is left out."""
    return _PATH.sub(lambda found: PurePath(found[0]).name, text)


def describe(error: BaseException) -> ApiError:
    """The API's answer to any exception; an unforeseen one is logged and told without its details.

    The server's own lack of something is no fault of the request: 507 where a disk is full, 503 where files
    or memory have run out, wherever in a chain of causes it stands. Tenants, who are no administrators, are
    not told where the server's files are (`NAMING`).
    """
    told = _describe(error)
    exchange = current_exchange.get()
    if exchange is None or exchange.account is None or exchange.account.tenant.is_admin:
        return told
    if not isinstance(error, NAMING) and not isinstance(error.__cause__, NAMING):
        return told
    return replace(told, message=without_paths(told.message), logged=told.message)


def _describe(error: BaseException) -> ApiError:
    if isinstance(error, ApiError | Refusal):
        if error.status == 429 and (exchange := current_exchange.get()) is not None:
            exchange.rejected_by = "queue" if isinstance(error, ApiError) else "tenant"
        return error if isinstance(error, ApiError) else _refused(error)
    if isinstance(error, RequestValidationError | ValidationError):
        return _invalid(error)
    if isinstance(error, ClientDisconnect):
        return ApiError(CLIENT_GONE, "the client has gone", "ClientGone")
    if (lack := _lack(error)) is not None:
        return lack
    for exception, status, kind in KINDS:
        if isinstance(error, exception):
            code = CONTEXT_LENGTH if isinstance(error, ContextLengthError) else None
            other = ApiError(status, str(error), kind, code=code)
            return unavailable(str(error), kind) if status == 503 else other
    logger.error("a request failed for an unforeseen reason", exc_info=error)
    return ApiError(500, "the server failed; its log says why", "InternalServerError")


def _refused(error: Refusal) -> ApiError:
    return ApiError(error.status, error.message, error.kind, error.param, error.headers, error.code)


def _lack(error: BaseException | None) -> ApiError | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return ApiError(507, f"the server's disk is full: {error.strerror}", "InsufficientStorageError")
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in BUSY):
            return unavailable("the server has run out of files or memory; try again later")
        error = error.__cause__
    return None


def _invalid(error: RequestValidationError | ValidationError) -> ApiError:
    """Names places and what would be right; the values, which may be long, are left out."""
    problems = [
        (".".join(shown(part, 64) for part in each["loc"]), shown(each["msg"])) for each in error.errors()
    ]
    lines = "".join(f"\n  {place}: {message}" for place, message in problems[:MAX_PROBLEMS])
    noun = "validation error" if len(problems) == 1 else "validation errors"
    return ApiError(400, f"{len(problems)} {noun}:{lines}", param=field_at(problems[0][0]))


def field_at(place: str) -> str | None:
    """The field of the body at `place` (`body.stop.1`: `stop.1`), as `param` names it, else None."""
    return place.removeprefix("body.") if place.startswith("body.") else None


def install_error_handlers(app: FastAPI) -> None:
    async def handle(request: Request, error: Exception) -> Response:
        return error_response(describe(error))

    async def handle_unforeseen(request: Request, error: Exception) -> Response:
        """What comes here goes on to whoever serves the application, which closes the connection."""
        exchange = exchange_of(request.scope)
        response = error_response(describe(error), exchange)
        response.headers.update({"Connection": "close", **exchange.headers()})
        return response

    async def handle_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:  # no handler raises it
            return error_response(ApiError(404, f"no route is at {shown(request.url.path)}", "NotFoundError"))
        if error.status_code != 405:
            return error_response(ApiError(error.status_code, str(error.detail)))
        headers = {**(error.headers or {}), "Allow": ", ".join(allowed_methods(request))}
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=headers)
        message = f"{shown(request.method)} is not allowed on this route, only {headers['Allow']}"
        return error_response(ApiError(405, message, "MethodNotAllowedError", headers=headers))

    foreseen = (ApiError, Refusal, ValueError, RuntimeError, OSError, MemoryError, RequestValidationError)
    for kind in (*foreseen, ClientDisconnect):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(Exception, handle_unforeseen)
    app.add_exception_handler(HTTPException, handle_http)
