"""The way of one inference request: placed, sent, its answer streamed back byte for byte.

Until the first byte of an answer nothing has reached the client, so a request whose server fails, refuses for
want of room, or is the wrong one by now, goes elsewhere. After it, a failure ends the stream with an error.
"""

import asyncio
import io
import logging
from enum import Enum
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from toppings.cluster.router import replies
from toppings.cluster.router.answers import (
    RETRIED_STATUSES,
    BadAnswerError,
    StreamWatch,
    Whole,
    check_whole,
    read_start,
)
from toppings.cluster.router.exchange import EXCHANGE, account_of
from toppings.cluster.router.flight import Flight
from toppings.cluster.router.headers import request_headers, response_headers
from toppings.cluster.router.spans import attempting, note_answer
from toppings.cluster.router.state import RouterState
from toppings.cluster.router.stream_tokens import StreamTokens
from toppings.cluster.router.upstream import CALL_FAILURES, AnswerTooLongError, Upstream
from toppings.cluster.snapshot import Choice
from toppings.open_files import is_out_of_files

logger = logging.getLogger(__name__)

NO_AUTO_HEADERS = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
BAD_GATEWAY = 502
LARGE_BODY_BYTES = 2**20
"""From here on a body is sent piece by piece, so that it does not hold up the loop."""


class Failure(Enum):
    """Why an attempt gave no answer to pass on."""

    REFUSED = "it said so"
    UNREACHABLE = "nobody listens"
    CUT = "the connection broke"
    BAD = "it was no answer"
    LATE = "it took too long"


class AttemptError(Exception):
    """A server gave no answer to pass on; `whole` is what it said where it refused."""

    def __init__(self, reason: str, failure: Failure, *, whole: Whole | None = None) -> None:
        super().__init__(reason)
        self.failure, self.whole = failure, whole


async def forward(state: RouterState, http_request: web.Request, flight: Flight) -> web.StreamResponse:
    """The answer to a request. Raises ApiError 502, 503 or 504 where no server could give one."""
    last: AttemptError | None = None
    num_attempts = 0
    while num_attempts < state.config.max_attempts:
        choice = await state.holding.place(flight)
        if choice is None and last is not None and last.failure is Failure.CUT:
            flight.tried.clear()  # a server may just have closed an idle connection: worth a second try there
            choice = await state.holding.place(flight)
        if choice is None:
            break
        try:
            with attempting(flight, choice):
                return await _attempt(state, http_request, flight, choice)
        except AttemptError as error:
            logger.info("on %s: %s", choice.instance_id, error)
            if flight.move_to is not None:
                flight.num_moves += 1
                state.meters.moves.inc()
                continue
            num_attempts += 1
            flight.tried.add(choice.instance_id)
            last = error
            state.meters.retries.labels(choice.instance_id).inc()
    return _give_up(state, last)


def _give_up(state: RouterState, last: AttemptError | None) -> web.Response:
    """What the last server refused with. Raises ApiError where it said nothing that could be passed on."""
    retry_after_s = state.config.retry_after_s
    if last is None:
        raise replies.unavailable("no server is up for this model", retry_after_s)
    if last.whole is not None:
        return last.whole.response()
    reason = f"no server could take the request: {last}"
    if last.failure in (Failure.BAD, Failure.CUT):
        raise replies.bad_gateway(reason)
    if last.failure is Failure.LATE:
        raise replies.out_of_time(reason, retry_after_s)
    raise replies.unavailable(reason, retry_after_s)


async def _attempt(
    state: RouterState, http_request: web.Request, flight: Flight, choice: Choice
) -> web.StreamResponse:
    upstream = state.upstreams[choice.instance_id]
    answer: aiohttp.ClientResponse | None = None
    try:
        answer, start, is_stream = await _open(state, http_request, flight, upstream)
        headers = response_headers(answer.headers, choice, account_of(http_request).tenant)
        note_answer(flight.attempt, answer.status)
        if not is_stream:
            return _finish_whole(state, flight, upstream, Whole(answer.status, headers, start))
        upstream.num_failures = 0
        return await _stream(state, http_request, flight, answer, chunk=start, headers=headers)
    except (asyncio.CancelledError, ConnectionError):
        state.flights.leave(flight)
        raise
    finally:
        state.end(flight)
        if answer is not None:
            answer.close()


async def _open(
    state: RouterState, http_request: web.Request, flight: Flight, upstream: Upstream
) -> tuple[aiohttp.ClientResponse, bytes, bool]:
    """Send the request; the answer, its first bytes and True, or all of it and False (see `read_start`).

    Raises AttemptError where that fails, takes too long, or is interrupted.
    """
    settings, call = state.config, flight.call
    limit_s = settings.first_token_timeout_s if call.is_stream else settings.response_timeout_s
    answer: aiohttp.ClientResponse | None = None
    flight.is_reusing = False
    try:
        async with asyncio.timeout(limit_s) as flight.deadline:
            answer = await state.session.post(
                _target(upstream.config.url, call.path, http_request),
                data=call.body if len(call.body) < LARGE_BODY_BYTES else io.BytesIO(call.body),
                headers=request_headers(state, http_request, upstream, flight),
                skip_auto_headers=NO_AUTO_HEADERS,
                allow_redirects=False,
                trace_request_ctx=flight,
            )
            return answer, *await read_start(answer, settings.max_answer_bytes)
    except BaseException as error:
        flight.deadline = None
        if answer is not None:
            answer.close()
        if not isinstance(error, (*CALL_FAILURES, BadAnswerError)):
            raise
        raise _explain(state, flight, upstream, error, limit_s) from error
    finally:
        flight.deadline = None


def _target(url: str, path: str, http_request: web.Request) -> URL:
    """The same route there; the query is the client's own, byte for byte."""
    query = http_request.rel_url.raw_query_string
    return URL(f"{url}{path}?{query}" if query else url + path, encoded=True)


def _explain(
    state: RouterState, flight: Flight, upstream: Upstream, error: BaseException, limit_s: float
) -> AttemptError:
    """What is to be told of an attempt; what it says of the server is noted. Raises ApiError 503 where the
    router itself could not even try.
    """
    name = flight.name_of(upstream.instance_id)
    if is_out_of_files(error):
        raise replies.unavailable("the router has too many files open", state.config.retry_after_s)
    if flight.move_to is not None:
        return AttemptError(f"moved to {flight.name_of(flight.move_to)}", Failure.REFUSED)
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | UnicodeError):
        state.note_failure(upstream, is_gone=True)
        return AttemptError(f"{name} cannot be reached", Failure.UNREACHABLE)
    if isinstance(error, TimeoutError):
        if not upstream.is_alive:
            return AttemptError(f"{name} went down before it answered", Failure.LATE)
        state.note_failure(upstream)
        return AttemptError(f"{name} gave no answer within {limit_s:g} s", Failure.LATE)
    if isinstance(error, BadAnswerError | AnswerTooLongError | aiohttp.ClientResponseError):
        state.note_status(upstream, BAD_GATEWAY)
        reason = "sent what is no HTTP" if isinstance(error, aiohttp.ClientResponseError) else error
        return AttemptError(f"{name} {reason}", Failure.BAD)
    if not flight.is_reusing:
        state.note_failure(upstream)
    return AttemptError(f"{name} broke the connection before answering", Failure.CUT)


def tracing() -> aiohttp.TraceConfig:
    """Of the session with which requests are sent: tells a flight what connection it got."""

    async def reuse(session: aiohttp.ClientSession, context: Any, params: object) -> None:
        flight = context.trace_request_ctx
        if isinstance(flight, Flight):
            flight.is_reusing = True

    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(reuse)
    return trace


def _finish_whole(state: RouterState, flight: Flight, upstream: Upstream, whole: Whole) -> web.Response:
    try:
        usage = check_whole(whole)
    except BadAnswerError as error:
        raise _explain(state, flight, upstream, error, 0.0) from error
    state.note_status(upstream, whole.status)
    if whole.status in RETRIED_STATUSES:
        reason = f"{flight.name_of(upstream.instance_id)} answered {whole.status}"
        raise AttemptError(reason, Failure.REFUSED, whole=whole)
    state.flights.start(flight)
    flight.num_tokens = usage.answer or None
    flight.settle(usage.prompt, usage.answer)
    return whole.response()


async def _stream(
    state: RouterState,
    http_request: web.Request,
    flight: Flight,
    answer: aiohttp.ClientResponse,
    *,
    chunk: bytes,
    headers: CIMultiDict[str],
) -> web.StreamResponse:
    """Pass chunks on as they come. A client that leaves ends this by an exception, and the answer with it."""
    state.flights.start(flight)
    response = web.StreamResponse(status=answer.status, headers=headers)
    await response.prepare(http_request)
    num_generated, watch = 0, StreamWatch(flight.call.path, answer.status)
    tokens = StreamTokens(flight.call.path)
    ends_at = asyncio.get_running_loop().time() + state.config.stream_timeout_s
    while chunk:
        await response.write(chunk)
        num_events = tokens.note(chunk)
        num_generated += num_events
        state.flights.grow(flight, num_events)
        flight.settle(
            tokens.prompt, max(num_generated, tokens.answer or 0)
        )  # of usage only the last is final
        watch.note(chunk)
        try:
            chunk = await _next(state, flight, answer, ends_at)
            watch.check_next(chunk) if chunk else watch.check_end()
        except (*CALL_FAILURES, BadAnswerError) as error:
            reason = _why_cut(state, flight, error, ends_at)
            await _cut(
                state, http_request, response, flight, reason, is_between_events=watch.is_between_events
            )
            return response
    flight.num_tokens = num_generated if tokens.answer is None else tokens.answer
    flight.settle(tokens.prompt, tokens.answer)
    state.note_status(state.upstreams[flight.instance_id], answer.status)
    await response.write_eof()
    return response


async def _next(state: RouterState, flight: Flight, answer: aiohttp.ClientResponse, ends_at: float) -> bytes:
    """More of a stream; b"" at its end. Raises TimeoutError, and what aiohttp raises."""
    flight.heard_at = asyncio.get_running_loop().time()
    limit_s = state.idle_limit_s(state.upstreams[flight.instance_id])
    try:
        async with asyncio.timeout_at(min(flight.heard_at + limit_s, ends_at)) as flight.idle:
            return await answer.content.readany()
    except TimeoutError:
        chunk = answer.content.read_nowait()
        is_there = chunk or answer.content.is_eof()
        if not is_there or asyncio.get_running_loop().time() >= ends_at:
            raise
        return chunk  # it has come: it was the router that was held up
    finally:
        flight.idle = None


def _why_cut(state: RouterState, flight: Flight, error: BaseException, ends_at: float) -> str:
    """What is to be told of a stream that cannot go on; what it says of the server is noted."""
    upstream = state.upstreams[flight.instance_id]
    if isinstance(error, BadAnswerError):
        state.note_status(upstream, BAD_GATEWAY)
        return str(error)
    is_late = isinstance(error, TimeoutError)
    if is_late and asyncio.get_running_loop().time() >= ends_at:
        return f"was not done in {state.config.stream_timeout_s:g} s"  # by our limit: it may be well
    if upstream.is_alive:
        state.note_failure(upstream)
    if not is_late:
        return "broke the connection"
    if upstream.is_silent:
        return "fell silent"
    return f"sent nothing for {state.config.idle_timeout_s:g} s"


async def _cut(
    state: RouterState,
    http_request: web.Request,
    response: web.StreamResponse,
    flight: Flight,
    reason: str,
    *,
    is_between_events: bool,
) -> None:
    end = f"{reason} after the first token; the answer is incomplete"
    logger.warning("server %s %s", flight.instance_id, end)
    message = f"{flight.name_of(flight.instance_id)} {end}"
    if response.content_type == replies.EVENT_STREAM:
        await response.write(
            replies.stream_error(flight.call.path, message, is_between_events=is_between_events)
        )
        await response.write_eof()
    elif http_request.transport is not None:
        http_request.transport.abort()  # the only way to say that a plain body is not whole
    flight.is_cut, http_request[EXCHANGE].error = True, message
    flight.attempt.fail(reason)
