"""The accounts of a fleet: what was sent to each instance and has not ended, kept as running sums.

The router and the simulator both keep one; every change costs a few scalar operations, so that deciding never
walks over requests. Knows nothing of HTTP and has no clock.
"""

from collections.abc import Container, Iterable, Mapping, Set
from dataclasses import dataclass, field

import numpy as np

from toppings.cluster.batch_sums import BatchSums
from toppings.cluster.instances import COLUMNS, DECODE, LISTS, PREFILL, BoolArray, Instances
from toppings.cluster.perf_model import CONTEXT_TOKENS, DISTINCT_RANK_SUM, STEPS, PerfModel
from toppings.cluster.snapshot import InstanceSnapshot, RequestSnapshot


@dataclass(slots=True)
class _Account:
    """Of one instance: `active` sums up all its requests as a decode batch, `waiting` those that wait as a
    prefill batch.
    """

    perf_model: PerfModel
    running: dict[str, RequestSnapshot] = field(default_factory=dict)
    num_generated: dict[str, int] = field(default_factory=dict)
    active: BatchSums = field(default_factory=BatchSums)
    waiting: BatchSums = field(default_factory=BatchSums)


class Fleet(Instances):
    """Instances whose accounts can be changed. Unknown ids raise KeyError.

    The columns of an instance that changed are written when they are next read: policies that read none of
    them pay nothing.
    """

    def __init__(self, snapshots: Iterable[InstanceSnapshot] = ()) -> None:
        super().__init__()
        self._rows: dict[str, int] = {}
        self._accounts: list[_Account] = []
        self._changed: tuple[set[int], set[int]] = (set(), set())  # rows with columns behind their accounts
        snapshots = list(snapshots)
        self._widen(len(snapshots))
        for snapshot in snapshots:
            self._check_new(snapshot.instance_id)
            self._fill(snapshot)

    # --- instances ---

    def add_instance(self, snapshot: InstanceSnapshot) -> None:
        """Raises ValueError where there is one of that id."""
        self._check_new(snapshot.instance_id)
        self._widen(1)
        self._fill(snapshot)

    def _check_new(self, instance_id: str) -> None:
        if instance_id in self._rows:
            raise ValueError(f"instance {instance_id!r} is in the fleet already")

    def _widen(self, num: int) -> None:
        """Columns for so many more instances."""
        self._settle()
        for name in COLUMNS:
            column = getattr(self, name)
            empty = np.zeros_like(column, shape=(*column.shape[:-1], num))
            setattr(self, name, np.append(column, empty, axis=-1))
        self._map_cells()

    def _map_cells(self) -> None:
        """Plain numbers are written to memory much faster than to elements of an array."""
        arrays = (self._batches[DECODE], self._batches[PREFILL], self._max_ranks)
        self._cells: list[memoryview[float]] = [memoryview(array.reshape(-1)) for array in arrays]  # type: ignore[arg-type]

    def _fill(self, snapshot: InstanceSnapshot) -> None:
        """The first columns that are nobody's become this instance's."""
        row = self._rows[snapshot.instance_id] = len(self.ids)
        self.ids.append(snapshot.instance_id)
        account = _Account(snapshot.perf_model)
        self._accounts.append(account)
        self.active.append(account.active.adapters)
        self.queued.append({})
        self.queued_adapters.append(account.waiting.adapters)
        self.on_device.append(set(snapshot.on_device))
        self.on_host.append(snapshot.on_host)
        self.is_open[row] = snapshot.is_open
        self.set_perf_model(snapshot.instance_id, snapshot.perf_model)
        self.set_limits(
            snapshot.instance_id,
            kv_tokens_total=snapshot.kv_tokens_total,
            kv_tokens_used=snapshot.kv_tokens_used,
            max_num_seqs=snapshot.max_num_seqs,
            max_adapters=snapshot.max_adapters,
            adapter_bytes_total=snapshot.adapter_bytes_total,
        )
        for request in (*snapshot.running, *snapshot.waiting):
            self.enqueue(snapshot.instance_id, request)
        for request in snapshot.running:
            self.start(snapshot.instance_id, request.request_id)

    def remove_instance(self, instance_id: str) -> None:
        """Forget an instance; the rows behind it move up."""
        self._settle()
        row = self._rows.pop(instance_id)
        for name in COLUMNS:
            setattr(self, name, np.delete(getattr(self, name), row, axis=-1))
        self._map_cells()
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
        self.models[PREFILL, STEPS, row] -= model.shared_ms  # prefills are asked about where others decode
        self.uses_distinct_ranks = bool(self.models[:, DISTINCT_RANK_SUM].any())
        self.link_ms_per_byte[row] = model.load_ms(1.0, is_on_host=True)
        self.disk_ms_per_byte[row] = model.load_ms(1.0, is_on_host=False) - self.link_ms_per_byte[row]

    def set_limits(self, instance_id: str, **limits: float) -> None:
        """Set some of `kv_tokens_total`, `kv_tokens_used`, `max_num_seqs`, `max_adapters`,
        `adapter_bytes_total`.
        """
        row = self._rows[instance_id]
        for name, value in limits.items():
            getattr(self, name)[row] = value
        if "max_adapters" in limits or "adapter_bytes_total" in limits:
            is_unknown = np.isinf(self.adapter_bytes_total)
            self.counts_slots = bool((is_unknown & np.isfinite(self.max_adapters)).any())

    def set_on_device(self, instance_id: str, adapters: set[str]) -> None:
        self.on_device[self._rows[instance_id]] = adapters

    def set_on_host(self, instance_id: str, adapters: Set[str]) -> None:
        self.on_host[self._rows[instance_id]] = adapters

    # --- requests ---

    def enqueue(self, instance_id: str, request: RequestSnapshot) -> int:
        """The request was sent there and waits; its row. Raises ValueError where it is there already."""
        row = self._rows[instance_id]
        account, waiting = self._accounts[row], self.queued[row]
        if request.request_id in waiting or request.request_id in account.running:
            raise ValueError(f"request {request.request_id!r} is on instance {instance_id!r} already")
        waiting[request.request_id] = request
        account.waiting.add(request.rank, request.adapter, *_prefill_of(request))
        account.active.add(request.rank, request.adapter, 1, request.prompt_tokens, request.adapter_bytes)
        self._note_adapters(row, account.active)
        self._changed[DECODE].add(row)
        self._changed[PREFILL].add(row)
        return row

    def start(self, instance_id: str, request_id: str) -> None:
        """The request got its first token: it waits no longer."""
        row = self._rows[instance_id]
        account, request = self._accounts[row], self.queued[row].pop(request_id)
        account.running[request_id] = request
        account.waiting.remove(request.rank, request.adapter, *_prefill_of(request))
        self._changed[PREFILL].add(row)

    def grow(self, instance_id: str, request_id: str, num_tokens: int) -> None:
        """A running request generated `num_tokens` more."""
        row = self._rows[instance_id]
        account = self._accounts[row]
        account.num_generated[request_id] = account.num_generated.get(request_id, 0) + num_tokens
        account.active.context_tokens += num_tokens
        self._changed[DECODE].add(row)

    def grow_to(self, instance_id: str, request_id: str, num_generated: int) -> None:
        """The request has generated so many by now; told of fewer than are known, nothing changes."""
        row = self._rows[instance_id]
        if num_generated > 0 and request_id in self.queued[row]:
            self.start(instance_id, request_id)
        num_new = num_generated - self._accounts[row].num_generated.get(request_id, 0)
        if num_new > 0:
            self.grow(instance_id, request_id, num_new)

    def finish(self, instance_id: str, request_id: str) -> None:
        """The request ended there, or left: whatever it counted for is taken back."""
        row = self._rows[instance_id]
        account = self._accounts[row]
        if request_id in self.queued[row]:
            self.start(instance_id, request_id)
        request = account.running.pop(request_id)
        context = request.prompt_tokens + account.num_generated.pop(request_id, 0)
        account.active.remove(request.rank, request.adapter, 1, context)
        self._note_adapters(row, account.active)
        self._changed[DECODE].add(row)

    def _note_adapters(self, row: int, active: BatchSums) -> None:
        self.adapter_bytes_used[row] = active.adapter_bytes
        self.num_adapters[row] = len(active.adapters)

    # --- looked at ---

    def rows_of(self, instance_ids: Iterable[str]) -> list[int]:
        """Their rows, in their order; those that are not in the fleet are left out."""
        return [row for each in instance_ids if (row := self._rows.get(each)) is not None]

    def rows_in(self, instance_ids: Container[str]) -> BoolArray:
        """Which rows are of these instances [N]."""
        return np.array([instance_id in instance_ids for instance_id in self.ids], dtype=np.bool_)

    def request_ids(self, instance_id: str) -> list[str]:
        row = self._rows[instance_id]
        return [*self._accounts[row].running, *self.queued[row]]

    def request(self, instance_id: str, request_id: str) -> RequestSnapshot:
        row = self._rows[instance_id]
        return self.queued[row].get(request_id) or self._accounts[row].running[request_id]

    def ranks(self, instance_id: str) -> Mapping[int, int]:
        """How many of the requests there are of each rank."""
        return self._accounts[self._rows[instance_id]].active.ranks

    def adapters(self, instance_id: str) -> Mapping[str, int]:
        """How many of the requests there are of each adapter."""
        return self.active[self._rows[instance_id]]

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
            adapter_bytes_total=float(self.adapter_bytes_total[row]),
            is_open=bool(self.is_open[row]),
        )

    def check_integrity(self) -> None:
        """Recount every instance from its requests; AssertionError where a running sum is off."""
        self._settle()
        for row, instance_id in enumerate(self.ids):
            account, snapshot = self._accounts[row], self.instance(instance_id)
            recounted = Fleet([snapshot])
            recounted.batches[DECODE, CONTEXT_TOKENS, 0] += sum(account.num_generated.values())
            for name in COLUMNS:
                mine, theirs = getattr(self, name)[..., row], getattr(recounted, name)[..., 0]
                assert np.array_equal(mine, theirs), f"{instance_id}: {name} is {mine}, recounted {theirs}"
            assert self.active[row] == recounted.active[0], instance_id
            assert set(account.num_generated) <= set(account.running), instance_id

    # --- columns ---

    def _settle(self) -> None:
        for kind, rows in enumerate(self._changed):
            if rows:
                self._write(kind, rows)
                rows.clear()

    def _write(self, kind: int, rows: set[int]) -> None:
        cells, max_ranks, num = self._cells[kind], self._cells[-1], len(self.is_open)
        for row in rows:
            account = self._accounts[row]
            sums = account.waiting if kind == PREFILL else account.active
            at = row
            for value in sums.features():
                cells[at] = value
                at += num
            max_ranks[kind * num + row] = sums.max_rank


def _prefill_of(request: RequestSnapshot) -> tuple[int, float]:
    """Its tokens that are to be computed, and the keys that they attend to."""
    cached, tokens = request.cached_tokens, request.prompt_tokens - request.cached_tokens
    return tokens, tokens * (cached + (tokens + 1) / 2)
