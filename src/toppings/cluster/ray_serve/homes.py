"""Which replicas are to read which adapters ahead: Serve's request router plans it, the front has it done.

Both live in the front's process, but Serve makes the first by itself, so that neither can be given the other.
"""

from collections.abc import Callable, Iterable

Homes = dict[str, list[str]]
"""By adapter, the replicas."""
MAX_ORDERS = 32
"""Homes that are told of at once: a plan may change many, and disks are slow. The rest is told with the next
plan's."""

_listeners: list[Callable[[Homes], object]] = []


def on_new_homes(listener: Callable[[Homes], object]) -> None:
    """To be called with the homes to be told of after a new plan, by the thread that made it."""
    _listeners.append(listener)


def tell(homes: Homes) -> None:
    for listener in _listeners if homes else ():
        listener(homes)


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
