"""The way of one inference request: placed, sent, its answer streamed back byte for byte.

Until the first byte of an answer nothing has reached the client, so a request whose server fails, refuses for
want of room, or is the wrong one by now, goes elsewhere. After it, a failure ends the stream with an error.
"""

import asyncio
import io
import logging
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

from toppings.cluster.router import replies
from toppings.cluster.router.calls import count_generated
from toppings.cluster.router.state import Flight, RouterState
from toppings.cluster.router.upstream import Upstream
from toppings.cluster.snapshot import Choice

logger = logging.getLogger(__name__)

RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504})
HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"}
    | {"transfer-encoding", "upgrade", "host", "content-length", "expect"}
)
NO_AUTO_HEADERS = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
MAX_MOVES = 3
LARGE_BODY_BYTES = 2**20
"""From here on a body is sent piece by piece, so that it does not hold up the loop."""


@dataclass(slots=True)
class Whole:
    """An answer that was read to its end."""

    status: int
    headers: CIMultiDict[str]
    body: bytes

    def response(self) -> web.Response:
        return web.Response(body=self.body, status=self.status, headers=self.headers)


class AttemptError(Exception):
    """A server gave no answer to pass on; `whole` is what it said instead, `was_cut` a broken connection."""

    def __init__(self, reason: str, *, whole: Whole | None = None, was_cut: bool = False) -> None:
        super().__init__(reason)
        self.whole, self.was_cut = whole, was_cut


async def forward(state: RouterState, http_request: web.Request, flight: Flight) -> web.StreamResponse:
    """The answer to a request. Raises ApiError 503 where no server could give one."""
    tried: set[str] = set()
    last: AttemptError | None = None
    num_attempts = num_moves = 0
    while num_attempts < state.config.max_attempts:
        choice = state.place(flight, tried)
        if choice is None and last is not None and last.was_cut:
            tried.clear()  # a server may just have closed an idle connection: worth a second try there
            choice, last.was_cut = state.place(flight, tried), False
        if choice is None:
            break
        if choice.breaks_slo:
            state.meters.slo_at_risk.inc()
        try:
            return await _attempt(state, http_request, flight, choice)
        except AttemptError as error:
            logger.info("request %s on %s: %s", flight.request.request_id, choice.instance_id, error)
            if flight.move_to is not None and num_moves < MAX_MOVES:
                num_moves += 1
                state.meters.moves.inc()
                continue
            flight.move_to = None
            num_attempts += 1
            tried.add(choice.instance_id)
            last = error
            state.meters.retries.labels(choice.instance_id).inc()
    if last is not None and last.whole is not None:
        return last.whole.response()
    reason = f"no server could take the request: {last}" if last else "no server is up for this model"
    raise replies.unavailable(reason, state.config.retry_after_s)


async def _attempt(
    state: RouterState, http_request: web.Request, flight: Flight, choice: Choice
) -> web.StreamResponse:
    upstream = state.upstreams[choice.instance_id]
    answer: aiohttp.ClientResponse | None = None
    state.begin(flight, choice.instance_id)
    try:
        answer, first = await _open(state, http_request, flight, upstream)
        headers = _response_headers(answer.headers, choice)
        if first is None:
            return _finish_whole(state, flight, upstream, Whole(answer.status, headers, await answer.read()))
        state.note_status(upstream, answer.status)
        return await _stream(state, http_request, flight, answer, chunk=first, headers=headers)
    finally:
        state.end(flight)
        if answer is not None:
            answer.close()


async def _open(
    state: RouterState, http_request: web.Request, flight: Flight, upstream: Upstream
) -> tuple[aiohttp.ClientResponse, bytes | None]:
    """Send the request; the answer with its first bytes, or None for them where all of it was read.

    Raises AttemptError where that fails, takes too long, or is interrupted.
    """
    settings, call = state.config, flight.call
    limit_s = settings.first_token_timeout_s if call.is_stream else settings.response_timeout_s
    answer: aiohttp.ClientResponse | None = None
    try:
        async with asyncio.timeout(limit_s) as flight.deadline:
            answer = await state.session.post(
                upstream.config.url + http_request.path_qs,
                data=call.body if len(call.body) < LARGE_BODY_BYTES else io.BytesIO(call.body),
                headers=_request_headers(http_request.headers, settings.upstream_api_key),
                skip_auto_headers=NO_AUTO_HEADERS,
                allow_redirects=False,
            )
            is_stream = answer.content_type == replies.EVENT_STREAM or answer.content_length is None
            if is_stream and answer.status not in RETRIED_STATUSES:
                return answer, await answer.content.readany()
            await answer.read()
            return answer, None
    except BaseException as error:
        flight.deadline = None
        if answer is not None:
            answer.close()
        if not isinstance(error, aiohttp.ClientError | TimeoutError | OSError):
            raise
        raise _explain(state, flight, upstream, error, limit_s) from error
    finally:
        flight.deadline = None


def _explain(
    state: RouterState, flight: Flight, upstream: Upstream, error: BaseException, limit_s: float
) -> AttemptError:
    if flight.move_to is not None:
        return AttemptError(f"moved to {flight.move_to}")
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        state.note_failure(upstream, is_gone=True)
        return AttemptError(f"{upstream.instance_id} cannot be reached")
    if isinstance(error, TimeoutError):
        if upstream.is_alive:
            state.note_failure(upstream)
        return AttemptError(
            f"{upstream.instance_id} gave no answer within {limit_s:g} s or went down meanwhile"
        )
    state.note_failure(upstream)
    return AttemptError(f"{upstream.instance_id} broke the connection before answering", was_cut=True)


def _finish_whole(state: RouterState, flight: Flight, upstream: Upstream, whole: Whole) -> web.Response:
    state.note_status(upstream, whole.status)
    if whole.status in RETRIED_STATUSES:
        raise AttemptError(f"{upstream.instance_id} answered {whole.status}", whole=whole)
    state.note_first_byte(flight)
    num_generated = count_generated(whole.body) if whole.status == 200 else None
    if num_generated:
        state.note_response(num_generated)
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
    request_id, instance_id = flight.request.request_id, flight.instance_id
    if flight.call.is_stream:
        state.fleet.start(instance_id, request_id)
    state.note_first_byte(flight)
    response = web.StreamResponse(status=answer.status, headers=headers)
    await response.prepare(http_request)
    num_generated, tail = 0, b""
    while chunk:
        await response.write(chunk)
        num_events = chunk.count(b"data:")
        num_generated += num_events
        state.fleet.grow(instance_id, request_id, num_events)
        tail = (tail + chunk)[-2:]
        try:
            async with asyncio.timeout(state.config.idle_timeout_s):
                chunk = await answer.content.readany()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            await _cut(state, http_request, response, flight, error, is_between_events=tail == b"\n\n")
            return response
    state.note_response(num_generated)
    await response.write_eof()
    return response


async def _cut(
    state: RouterState,
    http_request: web.Request,
    response: web.StreamResponse,
    flight: Flight,
    error: BaseException,
    *,
    is_between_events: bool,
) -> None:
    upstream = state.upstreams[flight.instance_id]
    state.note_failure(upstream)
    idle = f"sent nothing for {state.config.idle_timeout_s:g} s"
    reason = idle if isinstance(error, TimeoutError) else "broke the connection"
    message = f"server {upstream.instance_id} {reason} after the first token; the answer is incomplete"
    logger.warning("request %s: %s", flight.request.request_id, message)
    if response.content_type == replies.EVENT_STREAM:
        await response.write(
            replies.stream_error(flight.call.path, message, is_between_events=is_between_events)
        )
        await response.write_eof()
    elif http_request.transport is not None:
        http_request.transport.abort()  # the only way to say that a plain body is not whole
    flight.is_cut = True


def _end_to_end(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    return CIMultiDict([pair for pair in headers.items() if pair[0].lower() not in HOP_BY_HOP])


def _request_headers(headers: CIMultiDictProxy[str], upstream_api_key: str) -> CIMultiDict[str]:
    kept = _end_to_end(headers)
    if upstream_api_key:
        kept["Authorization"] = f"Bearer {upstream_api_key}"
    return kept


def _response_headers(headers: CIMultiDictProxy[str], choice: Choice) -> CIMultiDict[str]:
    kept = _end_to_end(headers)
    kept["X-Toppings-Instance"] = choice.instance_id
    if choice.breaks_slo:
        kept["X-Toppings-SLO"] = "at-risk"
    return kept
