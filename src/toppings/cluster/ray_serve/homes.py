"""What Serve's request router finds out and the front tells replicas: which adapters they are to read ahead,
and how many of them the demand needs.

Both live in the front's process, but Serve makes the first by itself, so that neither can be given the other.
"""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

Homes = dict[str, list[str]]
"""By adapter, the replicas."""
MAX_ORDERS = 32
"""Homes that are told of at once: a plan may change many, and disks are slow. The rest is told with the next
plan's."""

News = TypeVar("News")


class Channel(Generic[News]):
    """Whoever listens is called by the thread that tells."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[News], object]] = []

    def listen(self, listener: Callable[[News], object]) -> None:
        self._listeners.append(listener)

    def tell(self, news: News) -> None:
        for listener in self._listeners:
            listener(news)


new_homes: Channel[Homes] = Channel()
"""Those to be told of after a new plan."""
wanted_replicas: Channel[int] = Channel()
"""How many the demand needs within the objective."""


def by_adapter(pairs: Iterable[tuple[str, str]]) -> Homes:
    """Of adapters and replicas, in order."""
    homes: Homes = {}
    for adapter, replica in pairs:
        homes.setdefault(adapter, []).append(replica)
    return homes


def merged(newer: Homes, older: Homes) -> Homes:
    """Both, the newer ones first; no replica twice."""
    names = [*newer, *(name for name in older if name not in newer)]
    return {name: list(dict.fromkeys([*newer.get(name, ()), *older.get(name, ())])) for name in names}
