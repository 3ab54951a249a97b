"""Steps captured once per number of rows and replayed: on a GPU, a step costs one launch instead of hundreds,
on a CPU one call (`host_graphs.py`).

A graph has fixed inputs: a packed buffer on the device, at whose start every replay's inputs are put, so that
the graphs of one size find them where its first one did. A step is padded to the next size captured: rows
that pad it write their keys and values to a page that no sequence owns, and have no adapter. Graphs read of
an adapter what the pool's table says when they run: they stay valid while adapters come, move and go.

Adapters with more than A and B (`layout.py`'s extras) are not served from graphs.

Which projection groups a step's adapters change decides between a few graphs of each size (`GROUP_SETS`),
since launches that find nothing to do cost time all the same. Where an adapter may be folded into the base
model's weights (`folded_base.py`), so does whether there are rows that it is to be taken from.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from toppings.adapters.device_pool import DevicePool
from toppings.core import GROUPS, BatchItem
from toppings.engine.device_lora import DeviceLora, LoraSum
from toppings.engine.pages import pages_for
from toppings.engine.staging import Array, Staging, packed_bytes, unpack
from toppings.engine.step_inputs import Pending, StepRows
from toppings.model.decoder import Decoder
from toppings.ops.attention import AttentionMetadata, KVCache
from toppings.ops.gpu_plan import LoraBatch, decode_splits, lora_chunks, most_splits
from toppings.ops.lora import DEFAULT_DECODE_FORM, MAX_RANK, LoraForm, LoraSegments

GROUP_SETS = tuple(
    frozenset(groups) for groups in ((), ("qkv",), ("qkv", "o"), ("qkv", "o", "gate_up", "down"))
)
"""Sets of projection groups that graphs are captured for; the first that holds a step's own is used."""


class Graph(Protocol):
    """Work that was captured."""

    def replay(self) -> None:
        """Queues the work again, on the current stream."""


class GraphBackend(Protocol):
    """How work is captured on a device."""

    def capture(self, run: Callable[[], None]) -> Graph:
        """The work that `run` queues, all of it on the device; `run` may be called more than once."""


class CudaGraphs:
    """`GraphBackend` of `torch.cuda`; all graphs share one pool of memory. Not yet run on a GPU."""

    def __init__(self) -> None:
        cuda: Any = torch.cuda
        self._cuda = cuda
        self._pool = cuda.graph_pool_handle()
        self._stream = cuda.Stream()

    def capture(self, run: Callable[[], None]) -> Graph:
        self._stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(self._stream):
            run()  # compiles kernels and sets libraries up, neither of which may be captured
        self._cuda.current_stream().wait_stream(self._stream)
        graph: Graph = self._cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with self._cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph


@dataclass(frozen=True)
class GraphSpec:
    """What graphs are captured for. `max_num_tokens`: of one step; `out_offsets`: per projection group, the
    column of its fused output at which each module begins; `scratch_page`: a page of the cache that no
    sequence owns; `may_fold`: steps may have rows that a folded adapter is to be taken from."""

    max_num_seqs: int
    max_num_tokens: int
    max_context: int
    scratch_page: int
    out_offsets: dict[str, tuple[int, ...]]
    decode_form: LoraForm = DEFAULT_DECODE_FORM
    may_fold: bool = False


class Inputs(NamedTuple):
    """Of a step, on the host or on the device. [rows] `token_ids`, `positions`, `slots` (rows of the cache);
    [sequences] `context_lens`, of decodes; [splits, 4] `splits` and [sequences + 1] `split_indptr`, as in
    `AttentionTiles`; [sequences, pages] `page_tables`; [chunks, 3] `chunks` of rows with adapters, `minus` of
    those that a folded one is taken from; [2, sequences] `places` of pending tokens; `own`: what one kind of
    steps needs beside."""

    token_ids: Any
    positions: Any
    slots: Any
    context_lens: Any
    splits: Any
    split_indptr: Any
    page_tables: Any
    chunks: Any
    minus: Any
    places: Any
    own: tuple[Any, ...]

    @property
    def arrays(self) -> tuple[Any, ...]:
        return *self[:-1], *self.own

    @classmethod
    def of(cls, arrays: Sequence[Any]) -> "Inputs":
        return cls._make((*arrays[:10], tuple(arrays[10:])))


class StepGraphs(ABC):
    """Graphs of steps of one kind. To be made when the model, its cache and the pool are there and nothing
    else uses the device. `sizes`, rising: numbers of rows whose graphs are captured when they are first
    needed; None: all of `sizes_of`, and now."""

    _padding_context_len = 0
    """Of sequences that are none."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        pool: DevicePool,
        spec: GraphSpec,
        staging: Staging,
        backend: GraphBackend,
        sizes: tuple[int, ...] | None = None,
    ) -> None:
        self._decoder, self._cache, self._pool, self._spec = decoder, cache, pool, spec
        self._staging, self._backend = staging, backend
        self._sizes = self.sizes_of(spec) if sizes is None else sizes
        self.num_replays = 0
        if not self._sizes:
            return
        device = decoder.device
        largest = self._inputs_of([], None, self._sizes[-1])
        self._inputs = torch.empty(packed_bytes(largest.arrays), dtype=torch.uint8, device=device)
        shape = (min(spec.max_num_seqs, self._sizes[-1]), decoder.config.vocab_size)
        self._logits = torch.empty(shape, dtype=torch.float32, device=device)
        self._graphs: dict[tuple[int, frozenset[str], bool], Graph] = {}
        if sizes is None:
            for size in reversed(self._sizes):  # the largest first: the smaller ones find room in its memory
                for groups, is_minus in product(GROUP_SETS, (False, True) if spec.may_fold else (False,)):
                    self._graph(size, groups, is_minus)

    @staticmethod
    @abstractmethod
    def sizes_of(spec: GraphSpec) -> tuple[int, ...]:
        """Numbers of rows that graphs are captured for, ascending."""

    @property
    @abstractmethod
    def _form(self) -> LoraForm:
        """How adapters' rows are cut into chunks."""

    @abstractmethod
    def can_run(self, items: Sequence[BatchItem]) -> bool:
        """Whether a step of these is of this kind, and not too large."""

    @abstractmethod
    def _room(self, size: int) -> tuple[int, int]:
        """Sequences and chunks of adapters' rows in a step of `size` rows."""

    @abstractmethod
    def _own_inputs(self, items: Sequence[BatchItem], rows: StepRows | None, size: int) -> tuple[Array, ...]:
        """`rows` is None where there are no items."""

    @abstractmethod
    def _plan(self, inputs: Inputs, size: int) -> tuple[AttentionMetadata, LoraSegments, Tensor]:
        """What a captured step of `size` rows reads its attention and its adapters from, and the rows to draw
        from."""

    def run(
        self,
        items: Sequence[BatchItem],
        segments: LoraSegments | None,
        pending: Pending | None = None,
        minus: LoraSegments | None = None,
    ) -> Tensor:
        """Logits of the items that are drawn from, fp32 [drawn, vocab], until the next run. No adapter of
        theirs is loading."""
        num_rows = sum(item.num_tokens for item in items)
        size = next(size for size in self._sizes if size >= num_rows)
        groups = frozenset() if segments is None else self._pool.groups_of(segments.slots)
        covering = next(captured for captured in GROUP_SETS if groups <= captured)
        graph = self._graph(size, covering, minus is not None)
        arrays = self._inputs_of(items, segments, size, pending, minus).arrays
        self._staging.copy(arrays, self._inputs)
        if pending is not None:
            inputs = Inputs.of(unpack(self._inputs, arrays))
            pending.put_into(inputs.token_ids, inputs.places[:, : pending.places.shape[1]])
        graph.replay()
        self.num_replays += 1
        return self._logits[: sum(item.needs_sample for item in items)]

    def _inputs_of(
        self,
        items: Sequence[BatchItem],
        segments: LoraSegments | None,
        size: int,
        pending: Pending | None = None,
        minus: LoraSegments | None = None,
    ) -> Inputs:
        num_seqs, num_chunks = self._room(size)
        token_ids, positions = np.zeros((2, size), np.int64)
        slots = np.full(size, self._spec.scratch_page * self._cache.page_size)
        context_lens = np.full(num_seqs, self._padding_context_len, np.int32)
        num_pages = pages_for(self._spec.max_context, self._cache.page_size)
        page_tables = np.full((num_seqs, num_pages), self._spec.scratch_page, np.int32)
        chunks = np.tile(np.array([0, 0, -1], np.int32), (num_chunks, 1))
        minus_chunks = chunks.copy() if self._spec.may_fold else chunks[:0]
        places = np.zeros((2, num_seqs), np.int64)
        rows = None
        if items:
            rows = StepRows.of(items, self._cache.page_size)
            num, num_decodes = len(rows.token_ids), sum(item.is_decode for item in items)
            token_ids[:num], positions[:num], slots[:num] = rows.token_ids, rows.positions, rows.slot_mapping
            context_lens[:num_decodes] = rows.context_lens[:num_decodes]
            page_tables[: len(items), : rows.page_tables.shape[1]] = rows.page_tables
        splits = np.zeros((most_splits(num_seqs, self._spec.max_context), 4), np.int32)
        own_splits, split_indptr = decode_splits(context_lens)
        splits[: len(own_splits)] = own_splits
        if segments is not None:
            own = lora_chunks(segments, self._form)
            chunks[: len(own)] = own
        if minus is not None:
            taken = lora_chunks(minus, self._form)
            minus_chunks[: len(taken)] = taken
        if pending is not None:
            places[:, : pending.places.shape[1]] = pending.places
        own_inputs = self._own_inputs(items, rows, size)
        return Inputs(
            token_ids,
            positions,
            slots,
            context_lens,
            splits,
            split_indptr,
            page_tables,
            chunks,
            minus_chunks,
            places,
            own_inputs,
        )

    def _graph(self, size: int, groups: frozenset[str], is_minus: bool) -> Graph:
        """Captured now, where it is not there yet."""
        if (size, groups, is_minus) not in self._graphs:
            self._graphs[size, groups, is_minus] = self._capture(size, groups, is_minus)
        return self._graphs[size, groups, is_minus]

    def _capture(self, size: int, groups: frozenset[str], is_minus: bool) -> Graph:
        arrays = self._inputs_of([], None, size).arrays
        self._staging.copy(arrays, self._inputs)
        inputs = Inputs.of(unpack(self._inputs, arrays))
        meta, segments, rows = self._plan(inputs, size)
        wanted = [(inputs.minus, frozenset(GROUPS))] if is_minus else []
        if groups:
            wanted.append((inputs.chunks, groups))
        parts = []
        for chunks, its_groups in wanted:
            own = replace(segments, batches={chunks.device: LoraBatch(chunks, self._form, MAX_RANK)})
            parts.append(DeviceLora(self._pool, own, self._spec.out_offsets, its_groups))
        lora = LoraSum(*parts) if len(parts) > 1 else next(iter(parts), None)
        logits = self._logits[: len(rows)]

        def run() -> None:
            forward = self._decoder.forward
            logits.copy_(forward(inputs.token_ids, inputs.positions, self._cache, meta, rows, lora))

        return self._backend.capture(run)
