"""The accounts of a fleet: what was sent to each instance and has not ended, kept as running sums.

The router and the simulator both keep one; every change costs a few scalar operations, so that deciding never
walks over requests. Knows nothing of HTTP and has no clock.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from toppings.cluster.instances import COLUMNS, DECODE, LISTS, PREFILL, Instances
from toppings.cluster.perf_model import (
    CONTEXT_TOKENS,
    DISTINCT_RANK_SUM,
    PADDED_RANKS,
    RANK_SUM,
    STEPS,
    TOKENS,
    FloatArray,
    PerfModel,
)
from toppings.cluster.snapshot import InstanceSnapshot, RequestSnapshot

Key = TypeVar("Key", int, str)


@dataclass(slots=True)
class _Account:
    """What the columns cannot hold of one instance: its requests, and how many there are of each rank."""

    perf_model: PerfModel
    running: dict[str, RequestSnapshot] = field(default_factory=dict)
    num_generated: dict[str, int] = field(default_factory=dict)
    ranks: Counter[int] = field(default_factory=Counter)
    queued_ranks: Counter[int] = field(default_factory=Counter)


class Fleet(Instances):
    """Instances whose accounts can be changed. Unknown ids raise KeyError."""

    def __init__(self, snapshots: Iterable[InstanceSnapshot] = ()) -> None:
        super().__init__()
        self._rows: dict[str, int] = {}
        self._accounts: list[_Account] = []
        for snapshot in snapshots:
            self.add_instance(snapshot)

    # --- instances ---

    def add_instance(self, snapshot: InstanceSnapshot) -> None:
        """Raises ValueError where there is one of that id."""
        if snapshot.instance_id in self._rows:
            raise ValueError(f"instance {snapshot.instance_id!r} is in the fleet already")
        for name in COLUMNS:
            column = getattr(self, name)
            empty = np.zeros_like(column, shape=(*column.shape[:-1], 1))
            setattr(self, name, np.append(column, empty, axis=-1))
        row = self._rows[snapshot.instance_id] = len(self.ids)
        self.ids.append(snapshot.instance_id)
        self.active.append({})
        self.queued.append({})
        self.queued_adapters.append({})
        self.on_device.append(set(snapshot.on_device))
        self.on_host.append(set(snapshot.on_host))
        self._accounts.append(_Account(snapshot.perf_model))
        self.is_open[row] = snapshot.is_open
        self.set_perf_model(snapshot.instance_id, snapshot.perf_model)
        self.set_limits(
            snapshot.instance_id,
            kv_tokens_total=snapshot.kv_tokens_total,
            kv_tokens_used=snapshot.kv_tokens_used,
            max_num_seqs=snapshot.max_num_seqs,
            max_adapters=snapshot.max_adapters,
        )
        for request in (*snapshot.running, *snapshot.waiting):
            self.enqueue(snapshot.instance_id, request)
        for request in snapshot.running:
            self.start(snapshot.instance_id, request.request_id)

    def remove_instance(self, instance_id: str) -> None:
        """Forget an instance; the rows behind it move up."""
        row = self._rows.pop(instance_id)
        for name in COLUMNS:
            setattr(self, name, np.delete(getattr(self, name), row, axis=-1))
        for name in LISTS:
            del getattr(self, name)[row]
        del self._accounts[row]
        self._rows = {name: i for i, name in enumerate(self.ids)}

    def set_open(self, instance_id: str, is_open: bool) -> None:
        self.is_open[self._rows[instance_id]] = is_open

    def set_perf_model(self, instance_id: str, model: PerfModel) -> None:
        row = self._rows[instance_id]
        self._accounts[row].perf_model = model
        self.models[DECODE, :, row] = model.decode.vector
        self.models[PREFILL, :, row] = model.prefill.vector
        self.uses_distinct_ranks = bool(self.models[:, DISTINCT_RANK_SUM].any())
        self.link_ms_per_byte[row] = model.load_ms(1.0, is_on_host=True)
        self.disk_ms_per_byte[row] = model.load_ms(1.0, is_on_host=False) - self.link_ms_per_byte[row]

    def set_limits(self, instance_id: str, **limits: float) -> None:
        """Set some of `kv_tokens_total`, `kv_tokens_used`, `max_num_seqs`, `max_adapters`."""
        row = self._rows[instance_id]
        for name, value in limits.items():
            getattr(self, name)[row] = value

    def set_adapters(self, instance_id: str, *, on_device: set[str], on_host: set[str]) -> None:
        row = self._rows[instance_id]
        self.on_device[row], self.on_host[row] = on_device, on_host

    def add_adapter(self, instance_id: str, adapter: str) -> None:
        """A request brought the adapter onto the device."""
        self.on_device[self._rows[instance_id]].add(adapter)

    # --- requests ---

    def enqueue(self, instance_id: str, request: RequestSnapshot) -> None:
        """The request was sent there and waits. Raises ValueError where it is there already."""
        row = self._rows[instance_id]
        account, waiting = self._accounts[row], self.queued[row]
        if request.request_id in waiting or request.request_id in account.running:
            raise ValueError(f"request {request.request_id!r} is on instance {instance_id!r} already")
        waiting[request.request_id] = request
        self._count_queued(row, request, 1)
        self._count_active(row, request, 1, float(request.prompt_tokens))

    def start(self, instance_id: str, request_id: str) -> None:
        """The request got its first token: it waits no longer."""
        row = self._rows[instance_id]
        request = self.queued[row].pop(request_id)
        self._accounts[row].running[request_id] = request
        self._count_queued(row, request, -1)

    def grow(self, instance_id: str, request_id: str, num_tokens: int) -> None:
        """A running request generated `num_tokens` more."""
        row = self._rows[instance_id]
        generated = self._accounts[row].num_generated
        generated[request_id] = generated.get(request_id, 0) + num_tokens
        self.batches[DECODE, CONTEXT_TOKENS, row] += num_tokens

    def finish(self, instance_id: str, request_id: str) -> None:
        """The request ended there, or left: whatever it counted for is taken back."""
        row = self._rows[instance_id]
        account = self._accounts[row]
        if request_id in self.queued[row]:
            self.start(instance_id, request_id)
        request = account.running.pop(request_id)
        context = float(request.prompt_tokens + account.num_generated.pop(request_id, 0))
        self._count_active(row, request, -1, context)

    def instance(self, instance_id: str) -> InstanceSnapshot:
        """One instance as a frozen snapshot."""
        row = self._rows[instance_id]
        return InstanceSnapshot(
            instance_id=instance_id,
            perf_model=self._accounts[row].perf_model,
            running=tuple(self._accounts[row].running.values()),
            waiting=tuple(self.queued[row].values()),
            on_device=frozenset(self.on_device[row]),
            on_host=frozenset(self.on_host[row]),
            kv_tokens_total=float(self.kv_tokens_total[row]),
            kv_tokens_used=float(self.kv_tokens_used[row]),
            max_num_seqs=float(self.max_num_seqs[row]),
            max_adapters=float(self.max_adapters[row]),
            is_open=bool(self.is_open[row]),
        )

    def check_integrity(self) -> None:
        """Recount every instance from its requests; AssertionError where a running sum is off."""
        for row, instance_id in enumerate(self.ids):
            account, snapshot = self._accounts[row], self.instance(instance_id)
            recounted = Fleet([snapshot])
            recounted.batches[DECODE, CONTEXT_TOKENS, 0] += sum(account.num_generated.values())
            for name in COLUMNS:
                mine, theirs = getattr(self, name)[..., row], getattr(recounted, name)[..., 0]
                assert np.array_equal(mine, theirs), f"{instance_id}: {name} is {mine}, recounted {theirs}"
            assert self.active[row] == recounted.active[0], instance_id
            assert set(account.num_generated) <= set(account.running), instance_id

    # --- sums ---

    def _count_queued(self, row: int, request: RequestSnapshot, sign: int) -> None:
        account, tokens = self._accounts[row], float(request.prompt_tokens)
        attended = tokens * (tokens + 1) / 2
        batch = self.batches[PREFILL, :, row]
        self.max_ranks[PREFILL, row] = _add(
            batch, account.queued_ranks, request, sign, tokens=tokens, context=attended
        )
        if request.adapter is not None and _count(self.queued_adapters[row], request.adapter, sign):
            batch[DISTINCT_RANK_SUM] += sign * request.rank

    def _count_active(self, row: int, request: RequestSnapshot, sign: int, context: float) -> None:
        batch = self.batches[DECODE, :, row]
        self.max_ranks[DECODE, row] = _add(
            batch, self._accounts[row].ranks, request, sign, tokens=1.0, context=context
        )
        if request.adapter is not None and _count(self.active[row], request.adapter, sign):
            batch[DISTINCT_RANK_SUM] += sign * request.rank


def _add(
    batch: FloatArray,
    ranks: Counter[int],
    request: RequestSnapshot,
    sign: int,
    *,
    tokens: float,
    context: float,
) -> int:
    """Add (`sign` 1) or take away (-1) a request from a batch's features [F]; its largest rank after that."""
    _count(ranks, request.rank, sign)
    max_rank = max(ranks, default=0)
    batch[STEPS] = 1.0 if ranks else 0.0
    batch[TOKENS] += sign * tokens
    batch[PADDED_RANKS] = batch[TOKENS] * max_rank
    batch[RANK_SUM] += sign * tokens * request.rank
    batch[CONTEXT_TOKENS] += sign * context
    return max_rank


def _count(counts: dict[Key, int], key: Key, sign: int) -> bool:
    """Add `sign` to a count; True where the key came or went with it."""
    count = counts.get(key, 0) + sign
    if count:
        counts[key] = count
        return count == sign
    del counts[key]
    return True
