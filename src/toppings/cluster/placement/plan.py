"""What a placement answers: the homes of each adapter."""

from bisect import bisect
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from hashlib import blake2b

MAX_REMEMBERED = 200_000
"""Adapters whose homes by rule are remembered."""
NUM_POINTS = 64
"""Of a server on the ring: its share of adapters is then even to about an eighth."""


def hash_of(text: str) -> int:
    """64 bits, the same on every machine."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest())


class Ring:
    """Consistent hashing (Karger et al., STOC 1997): an adapter's homes are the first `num_homes` servers
    that follow its own point. A server that comes or goes changes the homes of its neighbours only.
    """

    def __init__(self, instance_ids: Sequence[str], num_homes: int) -> None:
        points = [(hash_of(f"{each} {i}"), each) for each in instance_ids for i in range(NUM_POINTS)]
        self._ids = [each for _, each in sorted(points)]
        self._points = sorted(at for at, _ in points)
        self._num_homes = min(num_homes, len(set(instance_ids)))

    def homes_of(self, adapter: str) -> tuple[str, ...]:
        at, homes = bisect(self._points, hash_of(adapter)), dict[str, None]()
        while len(homes) < self._num_homes:
            homes[self._ids[at % len(self._ids)]] = None
            at += 1
        return tuple(homes)


class Shards:
    """Shuffle sharding by rendezvous hashing (Thaler and Ravishankar, 1998): the `num_homes` servers whose
    hash with the adapter is largest, so that hardly two adapters share all of their homes.
    """

    def __init__(self, instance_ids: Sequence[str], num_homes: int) -> None:
        self._ids, self._num_homes = tuple(instance_ids), num_homes

    def homes_of(self, adapter: str) -> tuple[str, ...]:
        ranked = sorted(self._ids, key=lambda each: hash_of(f"{each} {adapter}"), reverse=True)
        return tuple(ranked[: self._num_homes])


class Anywhere:
    """No homes: the policy decides among all servers."""

    def homes_of(self, adapter: str) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Plan:
    """`chosen` homes by adapter; those of all others come from `rule`, and are remembered.

    `instance_ids` are the servers that it was made for.
    """

    instance_ids: tuple[str, ...]
    rule: Ring | Shards | Anywhere
    chosen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _others: dict[str, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)

    def homes_of(self, adapter: str) -> tuple[str, ...]:
        """Ids of servers, none twice; none at all where any server will do."""
        homes = self.chosen.get(adapter) or self._others.get(adapter)
        if homes is None:
            if len(self._others) >= MAX_REMEMBERED:
                self._others.clear()
            homes = self._others[adapter] = self.rule.homes_of(adapter)
        return homes

    def known_homes(self) -> list[tuple[str, tuple[str, ...]]]:
        """Of the adapters that were chosen for, the most loaded first, and of those that were asked about."""
        return [*self.chosen.items(), *self._others.items()]

    def num_moves_from(self, before: "Plan | None") -> int:
        """Homes of adapters that had other ones before."""
        if before is None:
            return 0
        pairs = ((homes, before.homes_of(each)) for each, homes in self.chosen.items())
        return sum(len(set(homes).difference(old)) for homes, old in pairs if old)


EMPTY_PLAN = Plan((), Anywhere())
"""Before the first one: no adapter has a home."""


class Untold:
    """Homes that plans have added and of which their servers were not told yet: only some are told at once.
    Those of the newest plan come first, its most loaded adapters before others."""

    def __init__(self) -> None:
        self._homes: dict[tuple[str, str], None] = {}  # of an adapter, a server
        self._noted: Set[tuple[str, str]] = frozenset()

    def note(self, plan: Plan) -> None:
        """Homes that are none any more by this plan need not be told. It may be the one of the last time, of
        which more homes are known by now."""
        left = {pair: None for pair in self._homes if pair[1] in plan.homes_of(pair[0])}
        known = {(adapter, home): None for adapter, homes in plan.known_homes() for home in homes}
        self._homes = {pair: None for pair in known if pair not in self._noted} | left
        self._noted = known.keys()

    def take(self, num: int, is_due: Callable[[str, str], bool]) -> list[tuple[str, str]]:
        """Up to so many, as adapter and server, which are told of now. The rest of those looked at, which are
        not due, are dropped, too."""
        taken: list[tuple[str, str]] = []
        while self._homes and len(taken) < num:
            pair = next(iter(self._homes))
            del self._homes[pair]
            if is_due(*pair):
                taken.append(pair)
        return taken
