"""Files below an address: s3://, gs://, https://, http://."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping

from toppings.sources.fetch import FetchError, FetchNotFound, Opened, Room
from toppings.sources.stores import StorePlace
from toppings.sources.web import WebPlace

SCHEME = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://.+")
SCHEMES = ("s3", "gs", "https", "http")
LOOK_TIMEOUT_S = 30.0
"""The longest that asking an address what it has may take."""
MAX_UNTOLD_BYTES = 64 << 20
"""Of files that have to be read to know which revision they are."""


def scheme_of(reference: str) -> str:
    """ "": it is no address."""
    match = SCHEME.fullmatch(reference)
    return "" if match is None else match["scheme"]


class RemoteFiles:
    """Files of the names `wanted` below `address`; what cannot be listed is asked for each of them."""

    def __init__(self, address: str, wanted: Iterable[str]) -> None:
        """Raises FetchError, FetchNotFound where there is none."""
        self.where = address.rstrip("/")
        self._place = _place(self.where)
        room = Room(MAX_UNTOLD_BYTES, LOOK_TIMEOUT_S)
        looked = ((name, self._place.look(name, room)) for name in sorted(wanted))
        self._found = {name: found for name, found in looked if found is not None}
        if not self._found:
            raise FetchNotFound(f"nothing is at {self.where}")
        self.version = hashlib.sha256(json.dumps(self._found, sort_keys=True).encode()).hexdigest()

    def sizes(self) -> Mapping[str, int | None]:
        return {name: size for name, (size, _) in self._found.items()}

    def open(self, name: str, room: Room, start: int = 0) -> Opened:
        return self._place.open(name, room, start)


def _place(address: str) -> WebPlace | StorePlace:
    scheme = scheme_of(address)
    if scheme not in SCHEMES:
        raise FetchError(f"{address!r} is no address that is read; these are: {', '.join(SCHEMES)}")
    return WebPlace(address) if scheme in ("http", "https") else StorePlace(address)
