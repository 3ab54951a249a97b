"""All replicas as one engine client, for the server's application to stand on."""

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from contextvars import Context
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from toppings.adapters.errors import AdapterNotFound
from toppings.adapters.registry import AdapterRecord, AdapterRegistry, Origin
from toppings.bad_input import RequestError
from toppings.cluster.lengths import ResponseLengths
from toppings.cluster.ray_serve.homes import Homes, merged, new_homes, wanted_replicas
from toppings.cluster.ray_serve.messages import SIGN_OF_LIFE, Ack, AdapterRef, Call, ReplicaReport
from toppings.cluster.ray_serve.reports import merge_stats
from toppings.core import ALONE, FinishReason, Standing
from toppings.engine.client import EngineDeadError
from toppings.messages import EngineReady, EngineStats, RequestOutput
from toppings.sampling_params import SamplingParams
from toppings.server.adapters import AdapterAdmin
from toppings.server.errors import ApiError, unavailable
from toppings.server.exchange import current_exchange
from toppings.server.state import ServerState
from toppings.tenants.book import ADMIN
from toppings.tenants.tenant import Tenant

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
REPORT_TIMEOUT_S = 2.0
ACCEPT_POLL_S = 0.25
AVOID_S = 15.0
"""How long a silent replica gets no requests: by then Serve has ended it, or it only slept."""


class ReplicaGoneError(Exception):
    """The replica that had the request will not answer it; `replica_id` is "" where none had it yet."""

    def __init__(self, replica_id: str, reason: BaseException) -> None:
        super().__init__(f"replica {replica_id or 'unknown'} failed: {type(reason).__name__}")
        self.replica_id = replica_id


class ReplicaClient:
    """What the server asks of an engine client, over a handle to the replicas.

    A request whose replica goes before its first token is sent to another one.
    """

    def __init__(
        self,
        engines: DeploymentHandle,
        registry: AdapterRegistry,
        *,
        accept_timeout_s: float,
        replica_timeout_s: float,
    ) -> None:
        self.died = asyncio.Event()  # never set: replicas come and go
        self.is_alive = True
        self.down_reason = ""
        self.num_pending = 0
        self._engines, self._registry = engines, registry
        self._accept_timeout_s, self._replica_timeout_s = accept_timeout_s, replica_timeout_s
        self._silent: dict[str, float] = {}  # replicas not heard of, and until when to avoid them
        self._info: EngineReady | None = None
        self._reading: asyncio.Task[None] | None = None
        self._unread: Homes = {}
        self._wanting: asyncio.Task[object] | None = None
        self._origin, self._numbers = uuid.uuid4().hex[:12], count()
        self._lengths = ResponseLengths()

    async def start(self) -> None:
        """Returns when a replica is ready."""
        self._info = await self._engines.info.remote()
        loop = asyncio.get_running_loop()
        new_homes.listen(lambda homes: loop.call_soon_threadsafe(self._start_reading, homes))
        wanted_replicas.listen(lambda num: loop.call_soon_threadsafe(self._start_wanting, num))

    @property
    def info(self) -> EngineReady:
        assert self._info is not None, "start comes first"
        return self._info

    # --- requests ---

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        adapter_id: int | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        standing: Standing = ALONE,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as a replica's engine draws tokens; closing the iterator early aborts the request.

        Raises EngineDeadError where the replica goes after the first token, ApiError 503 where none is left.
        """
        number = f"{self._origin}-{next(self._numbers)}"
        try:
            ref = None if adapter_id is None else AdapterRef.of(self._registry.get_by_id(adapter_id))
        except AdapterNotFound as error:
            yield RequestOutput(number, [], finish_reason=FinishReason.ERROR, error=str(error))
            return
        expected = self._lengths.expected(sampling.max_tokens)
        exchange = current_exchange.get()
        call = Call(
            number,
            prompt_token_ids,
            sampling,
            ref,
            expected,
            self._avoided(),
            cache_salt=cache_salt,
            standing=standing,
            http_id="" if exchange is None else exchange.request_id,
        )
        num_tokens = 0
        self.num_pending += 1
        try:
            async with aclosing(self._with_retries(call)) as outputs:
                async for output in outputs:
                    self.num_pending -= num_tokens == 0 and bool(output.token_ids)
                    num_tokens += len(output.token_ids)
                    yield output
            self._lengths.note(num_tokens)
        finally:
            self.num_pending -= num_tokens == 0

    async def _with_retries(self, call: Call) -> AsyncGenerator[RequestOutput, None]:
        has_begun = False
        for _ in range(MAX_ATTEMPTS):
            try:
                async with aclosing(self._attempt(call)) as outputs:
                    async for output in outputs:
                        has_begun = True
                        yield output
                return
            except ReplicaGoneError as error:
                logger.warning("request %s: %s", call.request_id, error)
                if has_begun:
                    raise EngineDeadError(
                        f"{error} after the first token; the answer is incomplete"
                    ) from error
                call = replace(call, avoid=call.avoid | {error.replica_id}, sent_to=[])
        raise unavailable(f"{MAX_ATTEMPTS} replicas failed before they answered")

    async def _attempt(self, call: Call) -> AsyncGenerator[RequestOutput, None]:
        """Raises ReplicaGoneError, or ApiError 503 where no replica takes the request in time."""
        # An empty context: calls made within one HTTP request would share Serve's id of it, and its router
        # tells them apart by that id.
        stream = Context().run(self._engines.options(stream=True).generate.remote, call)
        replica_id, has_ended = "", False
        try:
            replica_id = await self._accepted(stream, call)
            while (output := await self._next(stream, replica_id)) is not None:
                if output == SIGN_OF_LIFE:
                    continue
                has_ended = output.finish_reason is not None
                yield output
        except RayTaskError as error:
            if not isinstance(error.cause, EngineDeadError):
                raise
            raise ReplicaGoneError(replica_id, error.cause) from error
        except (RayError, RayServeException) as error:
            raise ReplicaGoneError(replica_id, error) from error
        finally:
            if not has_ended:
                stream.cancel()
        if not has_ended:
            raise ReplicaGoneError(replica_id, EOFError())

    async def _accepted(self, stream: DeploymentResponseGenerator, call: Call) -> str:
        """The replica that takes the request. One that it was sent to answers at once, or not at all."""
        coming = asyncio.ensure_future(anext(stream))
        loop = asyncio.get_running_loop()
        ends_at, sent_at = loop.time() + self._accept_timeout_s, math.inf
        try:
            while not coming.done():
                now = loop.time()
                sent_at = min(sent_at, now if call.sent_to else math.inf)
                if now >= sent_at + self._replica_timeout_s:
                    raise self._gone_silent(call.sent_to[-1])
                if now >= ends_at:
                    seconds = f"{self._accept_timeout_s:g} s"
                    raise unavailable(f"no replica could take the request within {seconds}")
                await asyncio.wait({coming}, timeout=min(ACCEPT_POLL_S, self._replica_timeout_s))
            return str(coming.result())
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)

    async def _next(self, stream: DeploymentResponseGenerator, replica_id: str) -> Any:
        """An output, or a sign of life; None at the stream's end."""
        try:
            async with asyncio.timeout(self._replica_timeout_s):
                return await anext(stream, None)
        except TimeoutError:
            raise self._gone_silent(replica_id) from None

    def _gone_silent(self, replica_id: str) -> ReplicaGoneError:
        self._silent[replica_id] = asyncio.get_running_loop().time() + AVOID_S
        return ReplicaGoneError(replica_id, TimeoutError())

    def _avoided(self) -> frozenset[str]:
        """Replicas of which nothing was heard lately; they get requests where there are no others."""
        if self._silent:
            now = asyncio.get_running_loop().time()
            self._silent = {name: until for name, until in self._silent.items() if until > now}
        return frozenset(self._silent)

    # --- administration ---

    async def adopt(self, record: AdapterRecord) -> list[Ack]:
        """What the replicas say that cannot have the adapter."""
        acks: list[Ack] = await self._broadcast("adopt", AdapterRef.of(record))
        return [ack for ack in acks if ack.error]

    async def remove_adapter(self, adapter_id: int) -> None:
        """Returns when the adapter's requests have ended and its memory is free on every replica."""
        ref = AdapterRef.of(self._registry.get_by_id(adapter_id))
        await self._broadcast("retire", ref)
        await self._broadcast("purge", ref)

    async def pin_adapter(self, adapter_id: int, is_pinned: bool) -> None:
        """Raises RequestError where a replica cannot pin it."""
        ref = AdapterRef.of(self._registry.get_by_id(adapter_id))
        acks: list[Ack] = await self._broadcast("pin", ref, is_pinned)
        _check(acks)

    async def prefetch_adapter(self, adapter_id: int) -> None:
        """On every replica. Raises as `pin_adapter`."""
        _check(await self._broadcast("prefetch", AdapterRef.of(self._registry.get_by_id(adapter_id))))

    def _start_reading(self, homes: Homes) -> None:
        """Have replicas read what they are homes of now; what is under way goes first."""
        self._unread = merged(homes, self._unread)
        if self._unread and (self._reading is None or self._reading.done()):
            self._reading = asyncio.create_task(self._read_ahead())

    async def _read_ahead(self) -> None:
        while self._unread:
            homes, self._unread = self._unread, {}
            told: list[tuple[AdapterRef, list[str]]] = []
            for name, replicas in homes.items():
                with suppress(AdapterNotFound):
                    told.append((AdapterRef.of(self._registry.get(name)), replicas))
            await self._broadcast("read_ahead", told, timeout_s=REPORT_TIMEOUT_S)

    def _start_wanting(self, num_replicas: int) -> None:
        """Have replicas tell Serve how many there should be. While they are being told, news is dropped."""
        if self._wanting is None or self._wanting.done():
            telling = self._broadcast("want", num_replicas, timeout_s=REPORT_TIMEOUT_S)
            self._wanting = asyncio.create_task(telling)

    async def stats(self) -> EngineStats:
        """All replicas' together."""
        return merge_stats(await self.reports(), self._id_of)

    async def reports(self) -> list[ReplicaReport]:
        """Of all replicas that answer."""
        return await self._broadcast("report", timeout_s=REPORT_TIMEOUT_S)

    def _id_of(self, name: str) -> int | None:
        try:
            return self._registry.get(name).adapter_id
        except AdapterNotFound:
            return None

    async def _broadcast(self, method: str, *args: object, timeout_s: float | None = None) -> list[Any]:
        """The replicas' answers. One that has gone meanwhile answers nothing: its successor starts anew.

        Neither does one that takes longer than `timeout_s`. Without it a hung one is waited for until Serve
        has found that it is, and ended it.
        """
        try:
            response = Context().run(self._engines.broadcast, method, *args)
            # Serve's own way to collect results gives none at all where one comes too late.
            async with asyncio.timeout(timeout_s):
                pending = await response._fetch_replica_results_async()
        except (RayServeException, TimeoutError) as error:
            logger.warning("%s of the replicas: %r", method, error)
            return []
        results = await asyncio.gather(
            *(asyncio.wait_for(each.get_async(), timeout_s) for each in pending), return_exceptions=True
        )
        failures = [each for each in results if isinstance(each, BaseException)]
        for failure in failures:
            logger.warning("%s of a replica: %r", method, failure)
        return [each for each in results if not isinstance(each, BaseException)]


class FleetAdmin(AdapterAdmin):
    """Adapter administration that is done when every replica has the adapter, or is rid of it."""

    def __init__(self, state: ServerState, replicas: ReplicaClient) -> None:
        super().__init__(state)
        self._replicas = replicas
        self._adopting = asyncio.Lock()

    async def _register(
        self,
        name: str,
        path: str,
        make: Callable[..., AdapterRecord],
        *,
        in_place: bool,
        origin: Origin = Origin.HTTP,
        fetched: Path | None = None,
        tenant: Tenant = ADMIN,
    ) -> AdapterRecord:
        """As one server's; an adapter that some replica cannot have is taken back, unless it was in place."""
        async with self._adopting:
            record = await super()._register(
                name, path, make, in_place=in_place, origin=origin, fetched=fetched, tenant=tenant
            )
            refusals = await self._replicas.adopt(record)
        if not refusals:
            return record
        if not in_place:
            await self.unload(name)
        reason = "; ".join(f"replica {ack.replica_id}: {ack.error}" for ack in refusals)
        raise ApiError(500, f"Loading lora {name} failed: {reason}", "InternalServerError")

    async def _remove_generation(self, record: AdapterRecord) -> None:
        """Not before the replicas know the generation that takes its place: it may have the same content."""
        async with self._adopting:
            pass
        await super()._remove_generation(record)


def _check(acks: list[Ack]) -> None:
    """Raises RequestError where a replica could not."""
    for ack in acks:
        if ack.error:
            raise RequestError(f"replica {ack.replica_id}: {ack.error}")
