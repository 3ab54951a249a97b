"""Answers that end when the client does: event streams, and waiting that notices who has left."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AbstractContextManager, aclosing
from typing import Any, TypeVar

import msgspec
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from toppings.server.errors import ApiError, describe, error_response

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed its connection; there is nobody to answer."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled at once when the client disconnects (ClientGoneError)."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def merged(streams: list[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all streams as they come, each with its stream's index; one that fails ends them all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            item_or_end = await queue.get()
            if isinstance(item_or_end, BaseException):
                raise item_or_end
            if item_or_end is None:
                num_open -= 1
            else:
                yield item_or_end
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int,
    stream: AsyncGenerator[T, None],
    queue: "asyncio.Queue[tuple[int, T] | BaseException | None]",
) -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                queue.put_nowait((index, item))
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)


def sse(content: object) -> bytes:
    """One server-sent event as OpenAI's clients expect it."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def openai_error_event(error: ApiError) -> bytes:
    return sse(error.body()) + DONE


class EventStream(Response):
    """Server-sent events. What fails before the first event is answered with its own status.

    `lease` is held from the first step to the last, however the stream ends.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        lease: AbstractContextManager[object],
        *,
        error_event: Callable[[ApiError], bytes] = openai_error_event,
        error_response: Callable[[ApiError], Response] = error_response,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            headers={**(headers or {}), "cache-control": "no-cache"}, media_type="text/event-stream"
        )
        del self.headers["content-length"]
        self._events = events
        self._lease = lease
        self._error_event = error_event
        self._error_response = error_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._lease:
            try:
                await until_gone(receive, self._run(scope, receive, send))
            except ClientGoneError:
                return

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                first = await anext(events)
            except Exception as error:
                await self._error_response(describe(error))(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _send_part(send, first)
            try:
                async for event in events:
                    await _send_part(send, event)
            except Exception as error:
                await _send_part(send, self._error_event(describe(error)))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})
