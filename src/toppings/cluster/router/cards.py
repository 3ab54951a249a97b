"""The models that a server lists; there may be ten thousand, which are read in slices between other work."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import msgspec

from toppings.tenants.tenant import Tenant

SLICE = 500
"""So many entries take about a millisecond to read."""

T = TypeVar("T")


class Card(msgspec.Struct):
    """One entry of `/v1/models`, with the bytes it was read from."""

    id: str
    parent: str | None = None
    root: Any = None
    raw: msgspec.Raw = msgspec.Raw(b"null")  # not of the entry: set when it was read
    public: msgspec.Raw | None = None  # as `raw`: set when it was told

    @property
    def adapter(self) -> str | None:
        """Its name where it is an adapter's; None for a base model."""
        return self.id if self.parent else None

    def told(self, tenant: Tenant) -> msgspec.Raw:
        """For tenants, who are no administrators, with its name in place of where its server has it."""
        if tenant.is_admin:
            return self.raw
        if self.public is None:
            card = {**msgspec.json.decode(self.raw), "root": self.id}
            self.public = msgspec.Raw(msgspec.json.encode(card))
        return self.public

    @property
    def path(self) -> str | None:
        """Where an adapter's files are, as its server knows it."""
        return self.root if self.parent and isinstance(self.root, str) else None


@dataclass(frozen=True, slots=True)
class Cards:
    """A server's models by name; `bases` are those without a parent."""

    by_name: dict[str, Card] = field(default_factory=dict)
    bases: tuple[str, ...] = ()

    def __contains__(self, name: object) -> bool:
        return name in self.by_name


class _Listed(msgspec.Struct):
    data: list[msgspec.Raw]


async def read_cards(body: bytes) -> Cards:
    """From the body of `/v1/models`. Raises ValueError; entries that are no models are passed over."""
    by_name: dict[str, Card] = {}
    for raw, card in await read_slices(msgspec.json.decode(body, type=_Listed).data, Card):
        card.raw = raw
        by_name.setdefault(card.id, card)
    return Cards(by_name, tuple(card.id for card in by_name.values() if not card.parent))


async def seen_by(tenant: Tenant, cards: Iterable[Card]) -> list[msgspec.Raw]:
    """Those that the tenant may see, as it is told of them."""
    seen, rest = [], iter(cards)
    while some := list(islice(rest, SLICE)):
        seen += [each.told(tenant) for each in some if tenant.is_admin or tenant.may_see(each.adapter)]
        await asyncio.sleep(0)
    return seen


async def read_slices(raws: list[msgspec.Raw], kind: type[T]) -> list[tuple[msgspec.Raw, T]]:
    """The entries that are of this kind, read one slice after the other, with turns for others between."""
    decoder, read = msgspec.json.Decoder(kind), []
    for start in range(0, len(raws), SLICE):
        for raw in raws[start : start + SLICE]:
            with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                read.append((raw, decoder.decode(raw)))
        await asyncio.sleep(0)
    return read
