"""Clients' bodies, read within bounds of size, of time, and of memory for all of them together."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from aiohttp import web

from toppings.cluster.router.flight import end_wait
from toppings.cluster.router.replies import ApiError, unavailable
from toppings.cluster.router.settings import RouterConfig

MAX_ADMIN_BYTES = 2**20


@dataclass(slots=True)
class Budget:
    """Bytes of requests that the router holds at once; a request holds its body until it ends. `readings`
    end when it is closed: aiohttp gives nothing more of a body once the router stops."""

    total_bytes: int
    used_bytes: int = field(default=0, init=False)
    is_closed: bool = field(default=False, init=False)
    readings: set[asyncio.Timeout] = field(default_factory=set, init=False)

    async def close(self, _: object = None) -> None:
        """The router stops: whose body is not there yet is answered 503."""
        self.is_closed = True
        for reading in self.readings:
            end_wait(reading)

    @asynccontextmanager
    async def reading(self, limit_s: float) -> AsyncIterator[None]:
        """Raises TimeoutError after this time, and at once when it is closed."""
        async with asyncio.timeout(0.0 if self.is_closed else limit_s) as reading:
            self.readings.add(reading)
            try:
                yield
            finally:
                self.readings.discard(reading)

    @contextmanager
    def share(self) -> "Iterator[Share]":
        """Gives back all that was taken."""
        taken = Share(self)
        try:
            yield taken
        finally:
            self.used_bytes -= taken.num_bytes


@dataclass(slots=True)
class Share:
    """What one request has of the budget."""

    budget: Budget
    num_bytes: int = 0

    def take(self, num_bytes: int) -> bool:
        """False where so much is not left."""
        if self.budget.used_bytes + num_bytes > self.budget.total_bytes:
            return False
        self.budget.used_bytes += num_bytes
        self.num_bytes += num_bytes
        return True


async def read_body(request: web.Request, config: RouterConfig, share: Share, limit: int = 0) -> bytes:
    """All of a body of at most `limit` bytes (0: `max_body_bytes`).

    Raises ApiError: 408 where it does not come in time, 413 where it is longer, 415 where it is compressed,
    503 where the router holds too much already, or stops before all is there.
    """
    limit = limit or config.max_body_bytes
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(415, f"Content-Encoding is {encoding[:40]!r}; send the body as it is")
    if (request.content_length or 0) > limit:
        raise _too_long(limit)
    body = bytearray()
    try:
        async with share.budget.reading(config.body_timeout_s):
            while chunk := await request.content.readany():
                if len(body) + len(chunk) > limit:
                    raise _too_long(limit)
                if not share.take(len(chunk)):
                    raise unavailable(
                        f"requests hold all of max_buffered_bytes, {config.max_buffered_bytes}",
                        config.retry_after_s,
                    )
                body += chunk
    except TimeoutError:
        if share.budget.is_closed:
            stopping = unavailable("the router is stopping", config.retry_after_s)
            stopping.headers["Connection"] = "close"
            raise stopping from None
        reason = f"the body did not come within body_timeout_s, {config.body_timeout_s:g} s"
        raise ApiError(408, reason, "RequestTimeout") from None
    except web.RequestPayloadError as error:
        raise ApiError(400, f"the body cannot be read: {error}") from error
    return bytes(body)


def _too_long(limit: int) -> ApiError:
    return ApiError(413, f"the body is longer than {limit} bytes")
