"""What every route needs: the engine's client, the registry, the tokeniser, and who is being served."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar
from weakref import WeakSet

from fastapi import Request

from toppings.adapters.errors import AdapterError
from toppings.adapters.recent_names import RecentNames
from toppings.adapters.registry import AdapterRegistry
from toppings.adapters.vocabulary import Vocabulary
from toppings.chat_template import ChatTemplate
from toppings.cluster.perf_model import PerfModel
from toppings.config import Config
from toppings.detokenizer import TokenSource
from toppings.exchanges.audit_log import AuditLog
from toppings.grammar.checker import StructureChecker
from toppings.messages import EngineReady, EngineStats
from toppings.sampling_defaults import read_do_sample, read_sampling_defaults
from toppings.server.cold_starts import ColdStarts
from toppings.server.errors import RETRY_AFTER_S, ApiError, unavailable, without_paths
from toppings.server.exchange import current_exchange
from toppings.server.left_requests import LeftRequests
from toppings.server.metrics import Metrics
from toppings.sources.models import find_model
from toppings.tenants.account import Account, Place, Tally
from toppings.tenants.book import TenantBook
from toppings.tenants.refusals import no_access, unauthorized
from toppings.text import TextModel

if TYPE_CHECKING:
    from toppings.server.resolver import Resolver

T = TypeVar("T")

LONG_TEXTS_AT_ONCE = 2
"""Bounds what long texts take of the machine; the others wait in their places in the queue."""
NEWCOMERS_SHARE = 4
"""A full queue has one place in so many beside, for tenants of whom nothing waits."""
MAX_TEMPLATES = 512  # that are kept at hand


class Client(TokenSource, Protocol):
    """What the server asks of an engine client."""

    died: asyncio.Event
    down_reason: str
    """Why there is no engine that takes requests; empty while there is one."""

    @property
    def info(self) -> EngineReady: ...
    @property
    def is_alive(self) -> bool: ...
    @property
    def num_pending(self) -> int: ...
    async def remove_adapter(self, adapter_id: int) -> None: ...
    async def pin_adapter(self, adapter_id: int, is_pinned: bool) -> None: ...
    async def prefetch_adapter(self, adapter_id: int) -> None: ...
    async def stats(self) -> EngineStats: ...


@dataclass(frozen=True, slots=True)
class Target:
    """Who answers a request: the base model (no `adapter_id`) or an adapter's current generation."""

    name: str
    adapter_id: int | None = None
    vocabulary: Vocabulary | None = None
    """Its own, where it has one."""
    text: TextModel | None = None
    """That of its own vocabulary, once `find_target` has made it."""


class Lease:
    """A request's place in the queue and among those of its tenant, left on exit, and by one that is dropped
    before it was entered."""

    def __init__(self, leases: "WeakSet[Lease]", place: Place) -> None:
        self.place = place
        self.started_at = time.perf_counter()
        """When its request came."""
        self.model = ""
        """Who answers it, once that is known."""
        self._leases = leases
        leases.add(self)

    @property
    def num_waiting(self) -> int:
        """Of its sequences, those that have had no token yet."""
        return self.place.num_waiting

    def note_started(self) -> None:
        self.place.start()

    async def during(self, work: Awaitable[T]) -> T:
        """The result of `work`, which prepares what comes next; where it fails, the place is given up."""
        try:
            return await work
        except BaseException:
            self._leave()
            raise

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._leave()

    def _leave(self) -> None:
        self._leases.discard(self)
        self.place.leave()


class ServerState:
    """One per application; used from its event loop only."""

    def __init__(
        self,
        client: Client,
        registry: AdapterRegistry,
        text: TextModel,
        config: Config,
        metrics: Metrics,
        book: TenantBook,
        perf_model: PerfModel | None = None,
    ) -> None:
        self.client = client
        self.registry = registry
        self.text = text
        self.config = config
        self.metrics = metrics
        self.book = book
        self.perf_model = perf_model
        is_asked = config.engine.generation_config == "auto"
        self.model_path = find_model(config.engine.model, config.engine.state_dir).path
        self.defaults = read_sampling_defaults(self.model_path) if is_asked else {}
        """The model's own sampling defaults, by the names of `SamplingParams`."""
        self.is_sampled_by_default = is_asked and read_do_sample(self.model_path)
        self.resolver: Resolver | None = None
        """Asks the adapter sources, where there are any."""
        self.is_draining = False
        self.cold_starts = ColdStarts()
        self.left = LeftRequests()
        self.audit = AuditLog()
        self.checker = StructureChecker(text.special_tokens, client.info.vocab_size)
        self.threads = ThreadPoolExecutor(LONG_TEXTS_AT_ONCE, "toppings-text")
        text.max_tokens = client.info.max_model_len
        self.started_at = int(time.time())
        self._leases: WeakSet[Lease] = WeakSet()
        self._tally = Tally()
        self._templates: dict[int, ChatTemplate | None] = {}
        self._names = RecentNames(registry)

    @property
    def base_name(self) -> str:
        return self.client.info.model_name

    @property
    def num_open(self) -> int:
        """Requests that have not been answered in full."""
        return len(self._leases)

    def open_requests(self) -> Iterator[tuple[str, str, int]]:
        """Of each its tenant, who answers it ("" while a source is asked), and how many of its sequences
        wait."""
        return ((lease.place.account.name, lease.model, lease.num_waiting) for lease in self._leases)

    @property
    def num_waiting(self) -> int:
        return max(self.client.num_pending, self._tally.num_waiting)

    @property
    def account(self) -> Account:
        """Of whoever sent the request that is being answered. Raises Refusal 401 where a key is asked for and
        nobody is known, as on an open path or outside of requests."""
        exchange = current_exchange.get()
        if exchange is not None and exchange.account is not None:
            return exchange.account
        if self.book.asks_for_keys:
            raise unauthorized(is_given=False)
        return self.book.anybody()

    async def find_target(
        self, model: str | None, *, kind: str | None = None, token: str | None = None
    ) -> Target:
        """As `target`, for who may use it; an adapter may have to come from a source first, of `kind`, with
        `token`.

        Raises ApiError, and Refusal 403 for what may be seen but not used.
        """
        adapter, account = None if model == self.base_name else model or None, self.account
        if not account.tenant.may_use(adapter):
            is_there = adapter is None or self.registry.find_named(adapter) is not None
            if is_there and account.tenant.may_see(adapter):
                raise no_access(account.name, model or self.base_name)
            raise self.unknown(model or self.base_name)
        if model and model != self.base_name and self.resolver is not None:
            await self.resolver.resolve(model, kind=kind, token=token)
        target = self.target(model)
        if target.vocabulary is None:
            return target
        loop = asyncio.get_running_loop()
        return replace(target, text=await loop.run_in_executor(self.threads, self.text.of, target.vocabulary))

    def text_of(self, target: Target) -> TextModel:
        """Tokens of its requests to text and back."""
        return target.text or self.text

    def vocab_size_of(self, target: Target) -> int:
        own = target.vocabulary
        return self.client.info.vocab_size if own is None else own.size or self.client.info.vocab_size

    def target(self, model: str | None) -> Target:
        """Raises ApiError 404 for a model that is not served; no name means the base model."""
        if not model or model == self.base_name:
            return Target(self.base_name)
        record = self.registry.find_named(model)
        if record is None:
            raise self.unknown(model)
        self._names.note(record.adapter_id, model)
        return Target(model, record.adapter_id, record.vocabulary)

    def unknown(self, model: str) -> ApiError:
        """404, the same for a model that there is not and for one that who asks may not see."""
        known, num = self.base_name, self.registry.count()
        if not self.account.tenant.sees_all:
            known = "what GET /v1/models lists"
        elif num:
            known += f" and {num} adapters, which GET /v1/models lists"
        message = f"The model `{model}` does not exist. Valid aliases: {known}."
        return ApiError(404, message, "NotFoundError", "model")

    def name_of(self, adapter_id: int) -> str:
        """An adapter's name, also while a removed generation still drains."""
        name = self._names.of(adapter_id)
        return f"removed-{adapter_id}" if name is None else name

    async def template_of(self, target: Target) -> ChatTemplate | None:
        """The chat template that an adapter has brought along; None where the base model's counts."""
        adapter_id = target.adapter_id
        if adapter_id is None:
            return None
        if adapter_id not in self._templates:
            source = await asyncio.to_thread(self._own_template, adapter_id)
            base = self.text.template
            is_own = source is not None and (base is None or source != base.source)
            if len(self._templates) >= MAX_TEMPLATES:
                self._templates.clear()
            owner = f"adapter {target.name!r}"
            self._templates[adapter_id] = ChatTemplate(source or "", owner) if is_own else None
        return self._templates[adapter_id]

    def _own_template(self, adapter_id: int) -> str | None:
        """None, too, where the adapter has gone or is damaged: whoever generates with it says so."""
        try:
            with self.registry.open_packed(adapter_id) as packed:
                return packed.header.chat_template
        except AdapterError:
            return None

    def check_open(self) -> None:
        """Raises ApiError 503 while the server shuts down, or has no engine."""
        if self.is_draining:
            raise unavailable("the server is shutting down")
        if self.client.died.is_set():
            raise ApiError(503, self.down_reason, "EngineDeadError")
        if not self.client.is_alive:
            raise unavailable(self.down_reason, "EngineDeadError")

    @property
    def down_reason(self) -> str:
        """Why there is no engine, for all: where keys are asked for, without paths."""
        reason = self.client.down_reason
        return without_paths(reason) if self.book.asks_for_keys else reason

    async def admit(self, num_sequences: int, find: Callable[[], Awaitable[Target]]) -> tuple[Target, Lease]:
        """Who answers, as `find` says, and a place for so many sequences.

        While a source is asked for the adapter, the request is open but has no place in the queue: a source
        that is slow keeps nobody else out. Raises as `lease` and `find`.
        """
        self._check_queue(num_sequences)
        with self.lease(0) as looking:
            target = await find()
        lease = self.lease(num_sequences)
        lease.started_at, lease.model = looking.started_at, target.name
        return target, lease

    def lease(self, num_sequences: int) -> Lease:
        """A place for a request of so many sequences, to be used as a context manager.

        Raises ApiError: 429 where the queue is full, 400 where the request alone is larger than the queue.
        Raises Refusal 429 where the tenant has too many open, or waiting: without a bound of its own half of
        the queue, so that none can fill it alone.
        """
        if num_sequences:
            self._check_queue(num_sequences)
        else:
            self.check_open()
        account, max_queue = self.account, self.config.server.max_queue
        own = 0 if account.tenant.is_admin else max(1, max_queue // 2)
        return Lease(self._leases, account.enter(num_sequences, self._tally, max_queue=own))

    def _check_queue(self, num_sequences: int) -> None:
        """Raises ApiError as `lease`."""
        self.check_open()
        max_queue = self.config.server.max_queue
        if num_sequences > max_queue:
            raise ApiError(
                400, f"the request asks for {num_sequences} sequences; at most {max_queue} may wait"
            )
        account = self.account
        is_newcomer = not account.tenant.is_admin and not account.num_waiting
        num_places = max_queue + (max_queue // NEWCOMERS_SHARE if is_newcomer else 0)
        if self.num_waiting + num_sequences > num_places:
            raise ApiError(
                429,
                f"{self.num_waiting} requests are waiting already; the queue holds {max_queue}",
                "TooManyRequestsError",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.toppings
    return state
