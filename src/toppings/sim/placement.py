"""Where a simulated server's adapters are: what its scheduler asks instead of the engine's manager.

`now_ns` is set by the instance before it calls the scheduler. Loads that a scheduling step began are taken
with `pop_loads`; the step waits for them, so that none is under way after it, which the instance tells with
`end_loads`. Who leaves first is the engine's own policy (adapters/eviction.py), asked as the engine asks it.
"""

from heapq import heapify, heappop, heappush
from typing import Protocol

from toppings.adapters.eviction import least_valuable, make_policy
from toppings.core import Admission
from toppings.sim.host_tier import HostTier
from toppings.sim.loading import LinkLoad
from toppings.sim.settings import NS_PER_MS, SimConfig


class SimPlacement(Protocol):
    """An `engine.adapter_placement.AdapterPlacement` on virtual time."""

    now_ns: int
    num_hits: int
    num_loads: int
    on_device: set[str] | None
    """Names of the adapters that have room there, also those that are loading; None: always the same."""

    @property
    def num_reads(self) -> int:
        """Reads from disk that have begun."""

    def prefetch(self, adapter_id: int) -> None: ...
    def holds(self, adapter_id: int) -> bool: ...
    def try_acquire(self, adapter_id: int, now: float, *, num_tokens: int = 1) -> Admission: ...
    def may_acquire(self, adapter_id: int) -> bool: ...
    def release(self, adapter_id: int) -> None: ...
    def load_tokens(self, adapter_id: int) -> float: ...
    def victims_for(self, adapter_id: int) -> list[int]: ...

    def pop_loads(self) -> list[LinkLoad]: ...
    def end_loads(self) -> None: ...

    def next_ready_ns(self) -> int | None:
        """When the next read from disk ends; None where none is under way."""

    def on_host(self) -> set[str] | None:
        """Names of the adapters in host memory; None: always the same."""

    def check_integrity(self) -> None: ...


def make_placement(config: SimConfig, adapter_names: list[str], adapter_bytes: list[int]) -> SimPlacement:
    """`adapter_names`, `adapter_bytes` [A]: the name and the size of each adapter."""
    return AllResident() if config.mode == "cached" else Pool(config, adapter_names, adapter_bytes)


class AllResident:
    """Every adapter is on the device from the start: mode `cached`, an ideal that no pool size limits."""

    def __init__(self) -> None:
        self.now_ns = self.num_hits = self.num_loads = self.num_reads = 0
        self.on_device: set[str] | None = None

    def prefetch(self, adapter_id: int) -> None:
        pass

    def holds(self, adapter_id: int) -> bool:
        return True

    def try_acquire(self, adapter_id: int, now: float, *, num_tokens: int = 1) -> Admission:
        self.num_hits += 1
        return Admission.READY

    def may_acquire(self, adapter_id: int) -> bool:
        return True

    def release(self, adapter_id: int) -> None:
        pass

    def load_tokens(self, adapter_id: int) -> float:
        return 0.0

    def victims_for(self, adapter_id: int) -> list[int]:
        return []

    def pop_loads(self) -> list[LinkLoad]:
        return []

    def end_loads(self) -> None:
        pass

    def next_ready_ns(self) -> int | None:
        return None

    def on_host(self) -> set[str] | None:
        return None

    def check_integrity(self) -> None:
        pass


class Pool:
    """A device pool of so many bytes, filled over a link that carries one load after another.

    Any free bytes serve: the engine's fragments are joined by compaction, but for blocks that are loading.
    """

    def __init__(self, config: SimConfig, adapter_names: list[str], adapter_bytes: list[int]) -> None:
        self.now_ns = self.num_hits = self.num_loads = 0
        self.on_device: set[str] | None = set()
        self._held = self.on_device
        self._names, self._bytes = adapter_names, adapter_bytes
        self._capacity_bytes = config.device_pool_bytes
        self._perf_model, self._latency_ms = config.perf_model, config.load_latency_ms
        self._load_ns: dict[int, int] = {}  # by bytes
        self._policy = make_policy(config.eviction)
        self._host = HostTier(config, adapter_bytes) if config.host_store_bytes else None
        self._num_users: dict[int, int] = {}  # of those that have room, first to last
        self._loading: dict[int, None] = {}
        self._idle: dict[int, int] = {}  # of those with no user and no load: the how-manieth to become so
        self._num_idled = 0
        self._leaving: list[tuple[float, int, int]] = []  # heap: worth, value in `_idle`, adapter
        self._used_bytes = self._idle_bytes = 0
        self._link_free_ns = 0
        self._loads: list[LinkLoad] = []

    # --- for the scheduler ---

    def prefetch(self, adapter_id: int) -> None:
        if self._host is not None and adapter_id not in self._num_users:
            self._host.is_ready(adapter_id, self.now_ns)

    def holds(self, adapter_id: int) -> bool:
        return adapter_id in self._num_users

    def try_acquire(self, adapter_id: int, now: float, *, num_tokens: int = 1) -> Admission:
        """Raises ValueError for an adapter that is larger than the pool or the host store."""
        num_users = self._num_users.get(adapter_id)
        if num_users is None:
            admission = self._place(adapter_id)
            if admission is not Admission.READY:
                return admission
        else:
            self.num_hits += 1
            self._num_users[adapter_id] = num_users + 1
            if self._idle.pop(adapter_id, None) is not None:
                self._idle_bytes -= self._bytes[adapter_id]
        self._policy.touch(adapter_id, self._bytes[adapter_id])
        return Admission.READY

    def may_acquire(self, adapter_id: int) -> bool:
        return True

    def release(self, adapter_id: int) -> None:
        num_users = self._num_users[adapter_id] = self._num_users[adapter_id] - 1
        if not num_users and adapter_id not in self._loading:
            self._make_idle(adapter_id)

    def load_tokens(self, adapter_id: int) -> float:
        """By time: 0 where a token of a prompt is predicted to take none."""
        token_ms = self._perf_model.prefill.coefficients.get("tokens", 0.0)
        return self._load_ns[self._bytes[adapter_id]] / NS_PER_MS / token_ms if token_ms else 0.0

    def victims_for(self, adapter_id: int) -> list[int]:
        in_use = [a for a, num_users in self._num_users.items() if num_users]
        room = self._capacity_bytes - sum(self._bytes[a] for a in in_use)
        victims = []
        for victim in least_valuable(self._policy, in_use):
            if room >= self._bytes[adapter_id]:
                break
            victims.append(victim)
            room += self._bytes[victim]
        return victims

    def _make_idle(self, adapter_id: int) -> None:
        number = self._idle[adapter_id] = self._num_idled = self._num_idled + 1
        heappush(self._leaving, (self._policy.worth(adapter_id), number, adapter_id))
        if len(self._leaving) > 4 * len(self._idle) + 64:
            self._leaving = [entry for entry in self._leaving if self._idle.get(entry[2]) == entry[1]]
            heapify(self._leaving)
        self._idle_bytes += self._bytes[adapter_id]

    def _place(self, adapter_id: int) -> Admission:
        num_bytes = self._bytes[adapter_id]
        if num_bytes > self._capacity_bytes:
            raise ValueError(
                f"adapter {adapter_id} takes {num_bytes} bytes; the pool has {self._capacity_bytes}"
            )
        if self._host is not None and not self._host.is_ready(adapter_id, self.now_ns):
            return Admission.LOADING
        num_free = self._capacity_bytes - self._used_bytes
        if num_free < num_bytes:
            if num_free + self._idle_bytes < num_bytes:
                return Admission.NO_ROOM
            self._evict_for(num_bytes)
        self._num_users[adapter_id] = 1
        self._used_bytes += num_bytes
        self._load(adapter_id, num_bytes)
        return Admission.READY

    def _evict_for(self, num_bytes: int) -> None:
        while self._capacity_bytes - self._used_bytes < num_bytes:
            victim = self._pop_least_valuable()
            del self._idle[victim], self._num_users[victim]
            self._policy.forget(victim, was_evicted=True)
            self._held.discard(self._names[victim])
            self._used_bytes -= self._bytes[victim]
            self._idle_bytes -= self._bytes[victim]

    def _pop_least_valuable(self) -> int:
        """The first of `least_valuable` of the idle ones: an adapter's worth stays the same while it is idle.
        Entries of those that were used since are passed over.
        """
        leaving, idle = self._leaving, self._idle
        while True:
            _, number, adapter_id = heappop(leaving)
            if idle.get(adapter_id) == number:
                return adapter_id

    def _load(self, adapter_id: int, num_bytes: int) -> None:
        load_ns = self._load_ns.get(num_bytes)
        if load_ns is None:
            load_ms = self._latency_ms + self._perf_model.load_ms(num_bytes, is_on_host=True)
            load_ns = self._load_ns[num_bytes] = round(load_ms * NS_PER_MS)
        begin_at = max(self.now_ns, self._link_free_ns)
        self._link_free_ns = begin_at + load_ns
        self._loads.append(LinkLoad(adapter_id, begin_at, self._link_free_ns, num_bytes))
        self._loading[adapter_id] = None
        self._policy.touch(adapter_id, num_bytes)
        self._held.add(self._names[adapter_id])
        self.num_loads += 1

    # --- for the instance ---

    @property
    def num_reads(self) -> int:
        return 0 if self._host is None else self._host.num_reads

    def pop_loads(self) -> list[LinkLoad]:
        if not self._loads:
            return []
        loads, self._loads = self._loads, []
        return loads

    def end_loads(self) -> None:
        """The step has ended, and with it the loads that it waited for."""
        if not self._loading:
            return
        loaded, self._loading = self._loading, {}
        for adapter_id in loaded:
            if not self._num_users[adapter_id]:
                self._make_idle(adapter_id)

    def next_ready_ns(self) -> int | None:
        return None if self._host is None else self._host.next_ready_ns(self.now_ns)

    def on_host(self) -> set[str] | None:
        return None if self._host is None else {self._names[a] for a in self._host.ids()}

    def check_integrity(self) -> None:
        assert self._used_bytes == sum(self._bytes[a] for a in self._num_users) <= self._capacity_bytes
        assert self._idle_bytes == sum(self._bytes[a] for a in self._idle)
        not_in_use = {a for a, num_users in self._num_users.items() if not num_users}
        assert set(self._idle) == not_in_use - set(self._loading)
