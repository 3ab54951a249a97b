"""Clients of one level of a fair queue (`fair_queue.py`): what each was served, and who is next."""

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count

from toppings.bad_input import MAX_INT
from toppings.core import Request

MAX_TURN_WAIT_S = 60.0
"""A client that has waited for so long without a start goes first, whatever was served to it."""
MAX_CLIENTS = 4096
"""Of a level: beyond, idle ones are forgotten, least served first, that were served more than others."""

_MIN_STALE = 64
"""Entries of a heap that are not true any more, so many at least, before they are swept out."""

Entry = tuple[int, float, int, "Client"]
"""Of a level's heap: priority of its first request, tokens served, turn, client."""


@dataclass(slots=True, eq=False)
class Client:
    """A tenant, or an adapter of one (`parent`). `served`: tokens by weight; `turn`: the how-manieth event of
    its level its last start was, or its beginning."""

    key: Hashable
    parent: "Client | None"
    turn: int
    weight: float = 1.0
    served: float = 0.0
    num_waiting: int = 0
    num_running: int = 0
    entry: "Entry | None" = None  # that holds in its level's heap, while it waits
    is_aside: bool = False  # for this step: none of its requests can start
    adapters: "Level | None" = None  # of a tenant
    requests: deque[Request] = field(default_factory=deque)  # of an adapter: those that wait, first to last

    @property
    def is_active(self) -> bool:
        """It has requests, waiting or running."""
        return bool(self.num_waiting or self.num_running)

    @property
    def priority(self) -> int:
        """Of the first request that waits."""
        if self.adapters is None:
            return self.requests[0].priority if self.requests else 0
        first = self.adapters.peek()
        return 0 if first is None else first.priority

    @property
    def is_batch(self) -> bool:
        """Whether all that waits is of the class batch."""
        return self.priority > MAX_INT

    def insert(self, request: Request, *, is_new: bool) -> None:
        """Into those that wait: by priority, then by arrival; one that had begun is before those that came
        with it.
        """
        rank, requests = _rank(request), self.requests

        def is_after(other: Request) -> bool:
            return _rank(other) > rank or (not is_new and _rank(other) == rank)

        if not requests or not is_after(requests[-1]):
            requests.append(request)
            return
        index = next(i for i, other in enumerate(requests) if is_after(other))
        requests.insert(index, request)


def _rank(request: Request) -> tuple[int, float]:
    return request.priority, request.arrived_at


class Level:
    """Clients that share what their parent gets. Those that wait stand in a heap; an entry that is not true
    any more is put right when it comes to the top, since what was served to a client grows. Without
    `has_priorities` all requests are of priority 0."""

    def __init__(self) -> None:
        self.has_priorities = False
        self.clients: dict[Hashable, Client] = {}
        self._virtual_time = 0.0
        self._now = -math.inf  # the latest instant that was told
        self._heap: list[Entry] = []
        self._waits_since: dict[Client, float] = {}  # its last start, or when it began to wait; in this order
        self._turns = count()

    def client(self, key: Hashable, parent: Client | None) -> Client:
        client = self.clients.get(key)
        if client is None:
            client = self.clients[key] = Client(key, parent, next(self._turns))
        return client

    def begin_wait(self, client: Client, now: float) -> None:
        """What it did not ask for until now is no claim."""
        client.served = max(client.served, self._virtual_time)
        self._now = max(self._now, now)
        self._waits_since[client] = self._now  # of a request that was put back, its arrival is long past
        self.push(client)

    def end_wait(self, client: Client) -> None:
        del self._waits_since[client]
        client.entry = None

    def push(self, client: Client) -> None:
        """Its turn may have come nearer."""
        client.entry = self._entry_of(client)
        heappush(self._heap, client.entry)
        if len(self._heap) > 2 * len(self.clients) + _MIN_STALE:
            self._heap = [entry for entry in self._heap if entry is entry[3].entry]
            heapify(self._heap)

    def peek(self) -> Client | None:
        """Who is next, by what was served."""
        heap = self._heap
        while heap:
            entry = heap[0]
            client = entry[3]
            if entry is not client.entry or client.is_aside:
                if heappop(heap) is client.entry:
                    client.entry = None
            elif entry[1] == client.served and entry == self._entry_of(client):
                return client
            else:
                client.entry = self._entry_of(client)
                heapreplace(heap, client.entry)
        return None

    def _entry_of(self, client: Client) -> Entry:
        return client.priority if self.has_priorities else 0, client.served, client.turn, client

    @property
    def num_entries(self) -> int:
        return len(self._heap)

    def next(self, now: float) -> Client | None:
        """Who is next: whoever has waited too long for a start, else as `peek`. Batch requests wait as long
        as there are others."""
        self._now = max(self._now, now)
        first = self.peek()
        for client, since in self._waits_since.items():
            if now - since <= MAX_TURN_WAIT_S:
                break
            if not client.is_aside and (first is None or client.is_batch <= first.is_batch):
                return client
        return first

    def note_start(self, client: Client, now: float) -> None:
        """It gets its turn, and has not been charged for it yet."""
        if client is self.peek():
            self._virtual_time = max(self._virtual_time, client.served)
        client.turn = next(self._turns)
        if client in self._waits_since:
            del self._waits_since[client]
            self._waits_since[client] = now

    def forget(self, client: Client) -> None:
        """Nothing of it is here; what it was served beyond the others is remembered."""
        if client.served <= self._virtual_time:
            del self.clients[client.key]
        elif len(self.clients) > MAX_CLIENTS:
            idle = [c for c in self.clients.values() if not c.is_active]
            for each in sorted(idle, key=lambda c: c.served)[: len(idle) // 2]:
                del self.clients[each.key]
