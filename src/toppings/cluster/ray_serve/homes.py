"""Which replicas are to read which adapters ahead: Serve's request router plans it, the front has it done.

Both live in the front's process, but Serve makes the first by itself, so that neither can be given the other.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice

Homes = dict[str, list[str]]
"""By adapter, the replicas."""
MAX_ORDERS = 32
"""Adapters that are told of at once: a plan may change many, and disks are slow."""

_listeners: list[Callable[[Homes], object]] = []


def on_new_homes(listener: Callable[[Homes], object]) -> None:
    """To be called with the homes that a new plan adds, by the thread that made it."""
    _listeners.append(listener)


def tell(homes: Homes) -> None:
    for listener in _listeners if homes else ():
        listener(homes)


def new_homes(
    known: Iterable[tuple[str, tuple[str, ...]]],
    before: Callable[[str], tuple[str, ...]],
    held: Mapping[str, frozenset[str]],
) -> Homes:
    """Of the first adapters of a plan that get homes they did not have `before`: those homes, but for
    replicas that hold the adapter already, in host memory or on the device."""
    added = (
        (
            adapter,
            [home for home in homes if home not in before(adapter) and adapter not in held.get(home, ())],
        )
        for adapter, homes in known
    )
    return dict(islice(((adapter, homes) for adapter, homes in added if homes), MAX_ORDERS))
