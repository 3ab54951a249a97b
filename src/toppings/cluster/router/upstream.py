"""One server as the router knows it, and the calls that the router itself makes to it."""

import asyncio
import logging
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import aiohttp
import msgspec

from toppings.cluster.router.reports import Report, parse_prometheus, parse_toppings_stats
from toppings.cluster.router.settings import InstanceConfig, RouterConfig

logger = logging.getLogger(__name__)

CALL_FAILURES = (aiohttp.ClientError, asyncio.TimeoutError, OSError)


class Kind(StrEnum):
    """How a server tells of itself."""

    UNKNOWN = "unknown"
    TOPPINGS = "toppings"
    OPENAI = "openai"


@dataclass(slots=True)
class Answer:
    status: int
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")


@dataclass(slots=True, eq=False)
class Upstream:
    """State of one server. Open for requests: `is_alive` and not `is_draining`.

    `cards` are its entries of `/v1/models` by id, None before they were read: then any model may be there.
    `applied` are the versions of the adapters that this router loaded there. `cooling_until` is when requests
    may come again after a row of 5xx answers.
    """

    config: InstanceConfig
    settings: RouterConfig
    session: aiohttp.ClientSession
    kind: Kind = Kind.UNKNOWN
    is_alive: bool = False
    is_draining: bool = False
    is_removed: bool = False
    num_failures: int = 0
    num_errors: int = 0
    cooling_until: float = 0.0
    synced_at: float | None = None
    cards: dict[str, dict[str, Any]] | None = None
    applied: dict[str, int] = field(default_factory=dict)
    recent_adapters: dict[str, None] = field(default_factory=dict)

    @property
    def instance_id(self) -> str:
        return self.config.instance_id

    def serves(self, model: str | None) -> bool:
        return model is None or self.cards is None or model in self.cards

    def touch_adapter(self, name: str, max_adapters: float) -> None:
        """Remember the adapters used there last, as many as fit: what one that does not tell may hold."""
        self.recent_adapters.pop(name, None)
        self.recent_adapters[name] = None
        while len(self.recent_adapters) > max_adapters:
            del self.recent_adapters[next(iter(self.recent_adapters))]

    # --- calls; all raise one of CALL_FAILURES where the server does not answer ---

    async def call(
        self, method: str, path: str, body: object = None, timeout_s: float | None = None
    ) -> Answer:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self.settings.upstream_api_key:
            headers["Authorization"] = f"Bearer {self.settings.upstream_api_key}"
        data = None if body is None else msgspec.json.encode(body)
        timeout = aiohttp.ClientTimeout(total=timeout_s or self.settings.health_timeout_s)
        url = self.config.url + path
        async with self.session.request(
            method, url, data=data, headers=headers, timeout=timeout, auto_decompress=True
        ) as response:
            return Answer(response.status, await response.read())

    async def is_healthy(self) -> bool:
        path = "/ready" if self.kind is Kind.TOPPINGS else "/health"
        try:
            return (await self.call("GET", path)).status == 200
        except CALL_FAILURES:
            return False

    async def detect_kind(self) -> None:
        """A server whose `/stats` reads as ours is a Toppings server, any other an OpenAI-compatible one."""
        answer = await self.call("GET", "/stats")
        try:
            if answer.status == 200:
                parse_toppings_stats(answer.body)
                self.kind = Kind.TOPPINGS
                return
        except ValueError as error:
            logger.debug("%s: /stats is not of a Toppings server: %s", self.instance_id, error)
        self.kind = Kind.OPENAI

    async def read_report(self) -> Report | None:
        """None where the server tells nothing that the router can use."""
        path = "/stats" if self.kind is Kind.TOPPINGS else "/metrics"
        answer = await self.call("GET", path)
        if answer.status != 200:
            return None
        try:
            return parse_toppings_stats(answer.body) if path == "/stats" else parse_prometheus(answer.text)
        except ValueError as error:
            logger.warning("%s: cannot read %s: %s", self.instance_id, path, error)
            return None

    async def read_cards(self) -> None:
        """Bring `cards` up to date; they stay as they are where the server does not list its models."""
        listed = await self.call("GET", "/v1/models", timeout_s=10 * self.settings.health_timeout_s)
        try:
            data = msgspec.json.decode(listed.body)["data"] if listed.status == 200 else None
            if data is not None:
                self.cards = {str(card["id"]): card for card in data}
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: cannot read /v1/models: %r", self.instance_id, error)

    async def read_adapters(self) -> Any:
        """The Toppings list of adapters; None where there is none to read."""
        if self.kind is not Kind.TOPPINGS:
            return None
        answer = await self.call("GET", "/adapters", timeout_s=10 * self.settings.health_timeout_s)
        try:
            return msgspec.json.decode(answer.body) if answer.status == 200 else None
        except ValueError:
            return None
