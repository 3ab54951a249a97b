"""One server as the router knows it, and the calls that the router itself makes to it."""

import asyncio
import logging
from dataclasses import dataclass, field
from enum import StrEnum
from http import HTTPStatus

import aiohttp
import msgspec

from toppings.cluster.report import ServerReport, read_report
from toppings.cluster.router.cards import Cards, read_cards
from toppings.cluster.router.exchange import current_exchange
from toppings.cluster.router.metrics_text import translate_metrics
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.open_files import is_out_of_files
from toppings.request_ids import REQUEST_ID
from toppings.tenants.book import ADMIN, TENANT_HEADER
from toppings.tenants.tenant import Tenant

logger = logging.getLogger(__name__)

CALL_FAILURES = (aiohttp.ClientError, asyncio.TimeoutError, OSError, UnicodeError)
"""Of any call to a server; UnicodeError: its name is none that may be looked up."""
ROUTER_HEADER = "X-Toppings-Router"
"""Of a router's own answers to checks: by its id a router knows itself."""
MAX_REPORT_BYTES = 32 * 2**20
"""What a server tells of itself, with ten thousand adapters, is a tenth of this."""


class AnswerTooLongError(aiohttp.ClientPayloadError):
    """A server sends more than is read of it."""


class Kind(StrEnum):
    """How a server tells of itself."""

    UNKNOWN = "unknown"
    TOPPINGS = "toppings"
    OPENAI = "openai"


class Health(StrEnum):
    """What a check says: it serves, it says that it does not, nothing is heard; or it could not be made. Or
    the router itself has answered."""

    OK = "ok"
    UNREADY = "unready"
    SILENT = "silent"
    UNASKED = "unasked"
    ITSELF = "itself"


@dataclass(slots=True)
class Answer:
    status: int
    body: bytes
    router_id: str = ""

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")


@dataclass(slots=True, eq=False)
class Upstream:
    """State of one server, as the router `router_id` sees it. Open for requests: `is_alive` and not
    `is_draining`. One that is down `is_silent` where nothing at all is heard of it, and `is_itself` where it
    is the router.

    `cards` are its entries of `/v1/models`, None before they were read: then any model may be there. They are
    what the `last_look` of `num_looks` at them told.
    `applied` are the versions of the adapters that this router loaded there. `changing` is held by whoever
    changes its adapters, never by a check; `waits` are the calls of such changes, which end when the server
    goes down.
    """

    config: InstanceConfig
    settings: RouterConfig
    session: aiohttp.ClientSession
    router_id: str
    kind: Kind = Kind.UNKNOWN
    is_alive: bool = False
    is_silent: bool = False
    is_draining: bool = False
    is_removed: bool = False
    is_itself: bool = False
    num_failures: int = 0
    num_errors: int = 0
    synced_at: float | None = None
    cards: Cards | None = None
    num_looks: int = 0
    last_look: int = 0
    applied: dict[str, int] = field(default_factory=dict)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    waits: set[asyncio.Timeout] = field(default_factory=set)
    placed: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)

    @property
    def instance_id(self) -> str:
        return self.config.instance_id

    def serves(self, model: str | None) -> bool:
        return model is None or self.cards is None or model in self.cards

    def headers_for(self, tenant: Tenant) -> dict[str, str]:
        """What tells it who asks, where that is a tenant and it is one of ours."""
        is_told = tenant.name and self.kind is Kind.TOPPINGS
        return {TENANT_HEADER: tenant.to_header()} if is_told else {}

    # --- calls; all raise one of CALL_FAILURES where the server does not answer ---

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        timeout_s: float | None = None,
        *,
        tenant: Tenant = ADMIN,
    ) -> Answer:
        headers = self.headers_for(tenant)
        if (exchange := current_exchange.get()) is not None:
            headers[REQUEST_ID] = exchange.request_id
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self.settings.upstream_api_key:
            headers["Authorization"] = f"Bearer {self.settings.upstream_api_key}"
        data = None if body is None else msgspec.json.encode(body)
        timeout = aiohttp.ClientTimeout(total=timeout_s or self.settings.health_timeout_s)
        url = self.config.url + path
        async with self.session.request(
            method, url, data=data, headers=headers, timeout=timeout, auto_decompress=True
        ) as response:
            body = await read_bounded(response, MAX_REPORT_BYTES)
            return Answer(response.status, body, response.headers.get(ROUTER_HEADER, ""))

    async def change(self, path: str, body: object, tenant: Tenant = ADMIN) -> Answer:
        """A call of `tenant` that changes its adapters, of at most `admin_timeout_s`, or until it goes
        down."""
        limit_s = self.settings.admin_timeout_s
        async with asyncio.timeout(limit_s) as wait:
            self.waits.add(wait)
            try:
                return await self.call("POST", path, body, 2 * limit_s, tenant=tenant)
            finally:
                self.waits.discard(wait)

    async def check_health(self) -> Health:
        path = "/ready" if self.kind is Kind.TOPPINGS else "/health"
        try:
            answer = await self.call("GET", path)
            if answer.router_id == self.router_id:
                return Health.ITSELF
            return Health.OK if answer.status == 200 else Health.UNREADY
        except CALL_FAILURES as error:
            return Health.UNASKED if is_out_of_files(error) else Health.SILENT

    async def detect_kind(self) -> None:
        """A server whose `/stats` reads as ours is a Toppings server, any other an OpenAI-compatible one, and
        so is one that does not let the router look. One that fails may be either: its kind stays unknown."""
        answer = await self.call("GET", "/stats")
        if answer.status >= 500 and answer.status != HTTPStatus.NOT_IMPLEMENTED:
            logger.info("%s answers /stats with %d: it is asked again", self.instance_id, answer.status)
            return
        if answer.status in (401, 403):
            logger.warning(
                "%s answers the router with %d: its load and adapters are not known, nor changed (setting "
                "upstream_api_key); clients' own keys are passed on where the router asks for none",
                self.instance_id,
                answer.status,
            )
        try:
            if answer.status == 200:
                read_report(answer.body)
                self.kind = Kind.TOPPINGS
                return
        except (ValueError, RecursionError) as error:
            logger.debug("%s: /stats is not of a Toppings server: %s", self.instance_id, error)
        self.kind = Kind.OPENAI

    async def ask_report(self) -> ServerReport | None:
        """None where the server tells nothing that the router can use."""
        path = "/stats" if self.kind is Kind.TOPPINGS else "/metrics"
        answer = await self.call("GET", path)
        if answer.status != 200:
            return None
        try:
            return read_report(answer.body) if path == "/stats" else translate_metrics(answer.text)
        except (ValueError, OverflowError, RecursionError) as error:
            logger.warning("%s: cannot read %s: %s", self.instance_id, path, error)
            return None

    async def read_cards(self) -> None:
        """Bring `cards` up to date; they stay as they are where the server does not list its models, or where
        one who asked later has its answer already.
        """
        self.num_looks += 1
        look = self.num_looks
        listed = await self.call("GET", "/v1/models", timeout_s=10 * self.settings.health_timeout_s)
        if listed.status != 200:
            return
        try:
            cards = await read_cards(listed.body)
            if look > self.last_look:
                self.cards, self.last_look = cards, look
        except (ValueError, RecursionError) as error:
            logger.warning("%s: cannot read /v1/models: %r", self.instance_id, error)

    async def read_adapters(self) -> bytes | None:
        """The Toppings list of adapters, as JSON; None where there is none."""
        if self.kind is not Kind.TOPPINGS:
            return None
        answer = await self.call("GET", "/adapters", timeout_s=10 * self.settings.health_timeout_s)
        return answer.body if answer.status == 200 else None


async def read_bounded(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """All of an answer. Raises AnswerTooLongError."""
    body = bytearray()
    while chunk := await response.content.readany():
        body += chunk
        if len(body) > max_bytes:
            response.close()
            raise AnswerTooLongError(f"answered with more than {max_bytes} bytes")
    return bytes(body)
