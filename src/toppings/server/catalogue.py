"""Long lists for `/v1/models` and the like, encoded in slices: ten thousand adapters hold up nobody."""

import asyncio
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import msgspec

from toppings.adapters.latest import Latest
from toppings.adapters.registry import AdapterRecord
from toppings.server.state import ServerState
from toppings.tenants.tenant import Tenant

T = TypeVar("T")
SLICE = 64
"""Items between two turns of the event loop; each takes some microseconds."""
MAX_LISTS = 8
"""Of tenants, that are kept at hand; one of ten thousand adapters is some megabytes."""


class Catalogue:
    """The cards of the base model and of all adapters. One that was made is kept as long as its adapter."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._cards: dict[tuple[int, bool], bytes] = {}  # by adapter id and whether it is for administrators
        self._version = -1  # of the cards and the lists
        self._lists: Latest[str, bytes] = Latest(MAX_LISTS)  # by who sees them

    async def models(self, tenant: Tenant) -> bytes:
        """The answer of `/v1/models`: what the tenant may see."""
        version = self._state.registry.version()
        key = "admin" if tenant.is_admin else "all" if tenant.sees_all else tenant.to_header()
        if version == self._version and key in self._lists:
            return self._lists[key]
        records = await records_of(self._state, tenant)
        cards = await encode_all(records, partial(self._card, tenant))
        listed = await asyncio.to_thread(self._list, cards, tenant)
        if version != self._version:
            self._lists.clear()
            self._version, self._cards = version, await asyncio.to_thread(self._live_cards)
        self._lists[key] = listed
        return listed

    def _live_cards(self) -> dict[tuple[int, bool], bytes]:
        live = set(self._state.registry.live_ids())
        return {key: card for key, card in list(self._cards.items()) if key[0] in live}

    def _list(self, cards: list[bytes], tenant: Tenant) -> bytes:
        """Beside the event loop: the whole answer."""
        base = [msgspec.json.encode(base_card(self._state, tenant))] if tenant.may_see(None) else []
        return b'{"object":"list","data":[' + b",".join([*base, *cards]) + b"]}"

    def _card(self, tenant: Tenant, record: AdapterRecord) -> bytes:
        key = (record.adapter_id, tenant.is_admin)
        card = self._cards.get(key)
        if card is None:
            card = self._cards[key] = msgspec.json.encode(adapter_card(self._state, record, tenant))
        return card


async def records_of(state: ServerState, tenant: Tenant) -> list[AdapterRecord]:
    """All live adapters by name that the tenant may see, looked up beside the event loop."""
    records = await asyncio.to_thread(state.registry.list)
    if tenant.sees_all:
        return records
    seen: list[AdapterRecord] = []
    for start in range(0, len(records), SLICE):
        seen += (record for record in records[start : start + SLICE] if tenant.may_see(record.name))
        await asyncio.sleep(0)
    return seen


async def encode_all(items: Iterable[T], encode: Callable[[T], bytes]) -> list[bytes]:
    encoded: list[bytes] = []
    rest = iter(items)
    while some := list(islice(rest, SLICE)):
        encoded += map(encode, some)
        await asyncio.sleep(0)
    return encoded


def told_path(record: AdapterRecord, tenant: Tenant) -> str:
    """Where an adapter came from, for administrators; for tenants its name, which says as much as they may
    know."""
    return str(record.path) if tenant.is_admin else record.name


def base_card(state: ServerState, tenant: Tenant) -> dict[str, Any]:
    root = str(state.model_path) if tenant.is_admin else state.base_name
    return _card(state.base_name, root, None, state.started_at, state.client.info.max_model_len)


def adapter_card(state: ServerState, record: AdapterRecord, tenant: Tenant) -> dict[str, Any]:
    root = told_path(record, tenant)
    return _card(record.name, root, state.base_name, int(record.created_at), None)


def _card(
    name: str, root: str, parent: str | None, created: int, max_model_len: int | None
) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "toppings",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [_permission(created)],
    }


def _permission(created: int) -> dict[str, Any]:
    return {
        "id": f"modelperm-{uuid.uuid4().hex}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
