"""Many instances at once, as columns: what policies read, so that a decision is a few array operations."""

import copy
from collections.abc import Container, Sequence, Set

import numpy as np
from numpy.typing import NDArray

from toppings.cluster.perf_model import (
    CONTEXT_TOKENS,
    DISTINCT_RANK_SUM,
    FEATURES,
    PADDED_RANKS,
    STEPS,
    TOKENS,
    FloatArray,
)
from toppings.cluster.snapshot import RequestSnapshot

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

DECODE, PREFILL = 0, 1
"""First index of `batches`, `models` and `max_ranks`."""

COLUMNS = (
    "is_open",
    "_batches",
    "models",
    "_max_ranks",
    "kv_tokens_total",
    "kv_tokens_used",
    "max_num_seqs",
    "max_adapters",
    "adapter_bytes_total",
    "adapter_bytes_used",
    "num_adapters",
    "link_ms_per_byte",
    "disk_ms_per_byte",
    "found_tokens",
)
LISTS = ("ids", "active", "queued_adapters", "queued", "on_device", "on_host")


class Instances:
    """Read-only view of N instances; policies get this and change nothing in it.

    Arrays, float64 [N] unless said: `is_open` bool; `batches` [2, F, N] are the features (`FEATURES`) of all
    running and waiting requests as one decode batch, and of the waiting ones as one prefill batch; `models`
    [2, F, N] are each instance's coefficients for the two, `max_ranks` [2, N] the batches' largest ranks;
    `kv_tokens_*`, `max_num_seqs`, `max_adapters`, `adapter_bytes_total` are limits (inf: unknown);
    `num_adapters` are in use by the requests there, and take `adapter_bytes_used` together;
    `link_ms_per_byte`, `disk_ms_per_byte` are what loading an adapter costs; `found_tokens` are those of the
    prompt in question that a server need not compute.

    Lists of length N: `ids`; `active` and `queued_adapters`, adapter to its number of requests, of all and
    of those that wait; `queued`, the waiting requests by id, oldest first; `on_device`, `on_host`, adapters.
    """

    def __init__(self) -> None:
        self.is_open: BoolArray = np.zeros(0, dtype=np.bool_)
        self._batches: FloatArray = np.zeros((2, len(FEATURES), 0))
        self.models: FloatArray = np.zeros((2, len(FEATURES), 0))
        self._max_ranks: FloatArray = np.zeros((2, 0))
        self.kv_tokens_total, self.kv_tokens_used = np.zeros(0), np.zeros(0)
        self.max_num_seqs, self.max_adapters = np.zeros(0), np.zeros(0)
        self.adapter_bytes_total, self.adapter_bytes_used = np.zeros(0), np.zeros(0)
        self.num_adapters = np.zeros(0)
        self.link_ms_per_byte, self.disk_ms_per_byte = np.zeros(0), np.zeros(0)
        self.found_tokens = np.zeros(0)
        self.uses_distinct_ranks = False  # whether any model has a coefficient for them
        self.counts_slots = False  # whether any tells how many adapters fit, but not their bytes
        self.ids: list[str] = []
        self.active: list[dict[str, int]] = []
        self.queued_adapters: list[dict[str, int]] = []
        self.queued: list[dict[str, RequestSnapshot]] = []
        self.on_device: list[set[str]] = []
        self.on_host: list[Set[str]] = []

    def __len__(self) -> int:
        return len(self.ids)

    def _settle(self) -> None:
        """Bring the columns up to date, before they are read."""

    @property
    def batches(self) -> FloatArray:
        self._settle()
        return self._batches

    @property
    def max_ranks(self) -> FloatArray:
        self._settle()
        return self._max_ranks

    @property
    def scanned(self) -> tuple[BoolArray | FloatArray, ...]:
        """What a scan over the instances reads (cluster/scan.py)."""
        self._settle()
        return (
            *(self.is_open, self.models, self._batches, self._max_ranks),
            *(self.kv_tokens_total, self.kv_tokens_used, self.max_num_seqs, self.found_tokens),
        )

    @property
    def num_requests(self) -> FloatArray:
        """Running and waiting requests [N]."""
        count: FloatArray = self.batches[DECODE, TOKENS]
        return count

    @property
    def free_kv_tokens(self) -> FloatArray:
        """Tokens of cache left [N]; in use is what the server reported, or what was sent there if more."""
        used: FloatArray = np.maximum(self.kv_tokens_used, self.batches[DECODE, CONTEXT_TOKENS])
        return self.kv_tokens_total - used

    def has_room(self, request: RequestSnapshot) -> BoolArray:
        """Where the request could run at once [N]: cache for prompt and response, a free sequence."""
        tokens = request.prompt_tokens + request.response_tokens
        room: BoolArray = (self.free_kv_tokens >= tokens) & (self.num_requests < self.max_num_seqs)
        return room

    def has_adapter_room(self, request: RequestSnapshot, share: float = 1.0) -> BoolArray:
        """Where the request's adapter, in use nowhere there, would fit that share of the device beside those
        in use [N].
        """
        fits: BoolArray = self.adapter_bytes_used + request.adapter_bytes <= share * self.adapter_bytes_total
        if self.counts_slots:
            fits &= np.isfinite(self.adapter_bytes_total) | (self.num_adapters < share * self.max_adapters)
        return fits

    def lacking_kv_share(self, request: RequestSnapshot) -> FloatArray:
        """What share of the cache must become free before prompt and response fit [N]; 0 where they fit."""
        tokens = request.prompt_tokens + request.response_tokens
        share: FloatArray = np.maximum(tokens - self.free_kv_tokens, 0.0) / self.kv_tokens_total
        return share

    def load_ms(self, request: RequestSnapshot) -> FloatArray:
        """Predicted time to get the request's adapter onto each device [N]; 0 where it is there already."""
        load_ms = request.adapter_bytes * (self.link_ms_per_byte + self.disk_ms_per_byte)
        if request.adapter is None:
            return np.zeros(len(self))
        on_host = rows_with(request.adapter, self.on_host)
        load_ms[on_host] = request.adapter_bytes * self.link_ms_per_byte[on_host]
        load_ms[rows_with(request.adapter, self.on_device)] = 0.0
        return load_ms

    def step_ms(self) -> FloatArray:
        """What the decode batch, and beside decodes the prefill batch, would take by the models, ms [2, N];
        0 for an empty one.
        """
        ms: FloatArray = np.einsum("bfn,bfn->bn", self.models, self.batches)
        return ms

    def step_ms_with(self, request: RequestSnapshot) -> FloatArray:
        """What they would take with the request added, ms [2, N]."""
        rank, found, one = request.rank, self.found_tokens, np.ones(len(self))
        tokens = request.prompt_tokens - found
        decode = (0, 1, 0, rank, rank, request.prompt_tokens, 1, 0)
        attended = tokens * (found + (tokens + 1) / 2)
        prefill = (0, tokens, 0, tokens * rank, rank, attended, 1, np.where(tokens > 1, found, 0))
        added = self.batches + np.stack([each * one for each in decode + prefill]).reshape(
            2, len(FEATURES), -1
        )
        added[:, STEPS] = 1.0
        np.multiply(added[:, TOKENS], np.maximum(self._max_ranks, rank), out=added[:, PADDED_RANKS])
        if self.uses_distinct_ranks and request.adapter is not None:
            added[DECODE, DISTINCT_RANK_SUM, rows_with(request.adapter, self.active)] -= rank
            added[PREFILL, DISTINCT_RANK_SUM, rows_with(request.adapter, self.queued_adapters)] -= rank
        ms: FloatArray = np.einsum("bfn,bfn->bn", self.models, added)
        return ms

    def finding(self, tokens: FloatArray) -> "Instances":
        """The same instances, asked about a prompt of which they need not compute so many tokens [N]."""
        view = copy.copy(self)
        view.found_tokens = tokens
        return view

    def among(self, mask: BoolArray) -> "Instances":
        """The same instances, with only those of `mask` [N] open."""
        view = copy.copy(self)
        view.is_open = self.is_open & mask
        return view

    def take(self, rows: IntArray) -> "Instances":
        """The instances of `rows` [K] as columns of their own; a choice among them has its row in 0..K-1."""
        self._settle()
        taken = Instances()
        for name in COLUMNS:
            setattr(taken, name, getattr(self, name)[..., rows])
        for name in LISTS:
            setattr(taken, name, [getattr(self, name)[row] for row in rows])
        taken.uses_distinct_ranks, taken.counts_slots = self.uses_distinct_ranks, self.counts_slots
        return taken

    def frozen(self) -> "Instances":
        """A copy that later changes of this fleet do not reach: what a router with stale knowledge sees."""
        kept = self.take(np.arange(len(self)))
        for name in LISTS[1:]:
            setattr(kept, name, [copy.copy(held) for held in getattr(kept, name)])  # of a frozenset: itself
        return kept


def rows_with(adapter: str, holders: Sequence[Container[str]]) -> list[int]:
    """Rows of the holders that have the adapter."""
    return [row for row, held in enumerate(holders) if adapter in held]
