"""Long lists for `/v1/models` and the like, encoded in slices: ten thousand adapters hold up nobody."""

import asyncio
import uuid
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeVar

import msgspec

from toppings.adapters.registry import AdapterRecord
from toppings.server.state import ServerState

T = TypeVar("T")
SLICE = 64
"""Items between two turns of the event loop; each takes some microseconds."""


class Catalogue:
    """The cards of the base model and of all adapters. One that was made is kept as long as its adapter."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._cards: dict[int, bytes] = {}  # by adapter id
        self._listed: tuple[int, bytes] = (-1, b"")

    async def models(self) -> bytes:
        """The answer of `/v1/models`."""
        version = self._state.registry.version()
        if self._listed[0] != version:
            records = await records_of(self._state)
            cards = await encode_all(records, self._card)
            self._listed = version, await asyncio.to_thread(self._list, records, cards)
        return self._listed[1]

    def _list(self, records: list[AdapterRecord], cards: list[bytes]) -> bytes:
        """Beside the event loop: the whole answer, and no cards kept but those in it."""
        self._cards = {record.adapter_id: card for record, card in zip(records, cards, strict=True)}
        base = msgspec.json.encode(base_card(self._state))
        return b'{"object":"list","data":[' + b",".join([base, *cards]) + b"]}"

    def _card(self, record: AdapterRecord) -> bytes:
        card = self._cards.get(record.adapter_id)
        if card is None:
            card = self._cards[record.adapter_id] = msgspec.json.encode(adapter_card(self._state, record))
        return card


async def records_of(state: ServerState) -> list[AdapterRecord]:
    """All live adapters by name, looked up beside the event loop."""
    return await asyncio.to_thread(state.registry.list)


async def encode_all(items: Iterable[T], encode: Callable[[T], bytes]) -> list[bytes]:
    encoded: list[bytes] = []
    rest = iter(items)
    while some := list(islice(rest, SLICE)):
        encoded += map(encode, some)
        await asyncio.sleep(0)
    return encoded


def base_card(state: ServerState) -> dict[str, Any]:
    return _card(
        state.base_name, str(state.model_path), None, state.started_at, state.client.info.max_model_len
    )


def adapter_card(state: ServerState, record: AdapterRecord) -> dict[str, Any]:
    return _card(record.name, str(record.path), state.base_name, int(record.created_at), None)


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
