"""Decode steps captured once per batch size and replayed: on a GPU, a step costs one launch instead of
hundreds, on a CPU one call (`host_graphs.py`).

A graph has fixed inputs: a packed buffer on the device, at whose start every replay's inputs are put, so that
the graphs of one batch size find them where its first one did. A batch is padded to the next size captured:
rows that pad it write their keys and values to a page that no sequence owns, and have no adapter. Graphs read
of an adapter what the pool's table says when they run: they stay valid while adapters come, move and go.

Adapters with more than A and B (`layout.py`'s extras) are not served from graphs.

Which projection groups a step's adapters change decides between a few graphs of each size (`GROUP_SETS`),
since launches that find nothing to do cost time all the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from toppings.adapters.device_pool import DevicePool
from toppings.core import BatchItem
from toppings.engine.device_lora import DeviceLora
from toppings.engine.pages import pages_for
from toppings.engine.staging import Array, Staging, packed_bytes, unpack
from toppings.engine.step_inputs import Pending, StepRows
from toppings.model.decoder import Decoder
from toppings.ops.attention import AttentionMetadata, KVCache
from toppings.ops.gpu_plan import AttentionTiles, LoraBatch, lora_chunks
from toppings.ops.lora import DEFAULT_DECODE_FORM, MAX_RANK, LoraForm, LoraSegments

GROUP_SETS = tuple(
    frozenset(groups) for groups in ((), ("qkv",), ("qkv", "o"), ("qkv", "o", "gate_up", "down"))
)
"""Sets of projection groups that graphs are captured for; the first that holds a step's own is used."""

_SMALL_SIZES = (1, 2, 4, 8)
_SIZE_STEP = 8


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


def batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Sizes that graphs are captured for: 1, 2, 4, 8, then multiples of 8, and `max_num_seqs` itself."""
    sizes = {*_SMALL_SIZES, *range(_SIZE_STEP, max_num_seqs, _SIZE_STEP), max_num_seqs}
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))


@dataclass(frozen=True)
class GraphSpec:
    """What graphs are captured for. `out_offsets`: per projection group, the column of its fused output at
    which each module begins; `scratch_page`: a page of the cache that no sequence owns."""

    max_num_seqs: int
    max_context: int
    scratch_page: int
    out_offsets: dict[str, tuple[int, ...]]
    decode_form: LoraForm = DEFAULT_DECODE_FORM


class DecodeGraphs:
    """To be made when the model, its cache and the pool are there and nothing else uses the device. `sizes`,
    rising: numbers of rows whose graphs are captured when they are first needed; None: all, and now."""

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
        self._num_pages = pages_for(spec.max_context, cache.page_size)
        self._sizes = sizes or batch_sizes(spec.max_num_seqs)
        device = decoder.device
        largest = self._arrays([], None, self._sizes[-1])
        self._inputs = torch.empty(packed_bytes(largest), dtype=torch.uint8, device=device)
        self._rows = torch.arange(self._sizes[-1], device=device)
        shape = (self._sizes[-1], decoder.config.vocab_size)
        self._logits = torch.empty(shape, dtype=torch.float32, device=device)
        self._graphs: dict[tuple[int, frozenset[str]], Graph] = {}
        if sizes is None:
            for size in reversed(self._sizes):  # the largest first: the smaller ones find room in its memory
                for groups in GROUP_SETS:
                    self._graph(size, groups)
        self.num_replays = 0

    def can_run(self, items: Sequence[BatchItem]) -> bool:
        """Every item is one token that continues a sequence, and is drawn from."""
        return len(items) <= self._sizes[-1] and all(item.is_decode and item.needs_sample for item in items)

    def run(
        self, items: Sequence[BatchItem], segments: LoraSegments | None, pending: Pending | None = None
    ) -> Tensor:
        """Logits of the items, fp32 [items, vocab], until the next run. No adapter of theirs is loading."""
        size = next(size for size in self._sizes if size >= len(items))
        groups = frozenset() if segments is None else self._pool.groups_of(segments.slots)
        covering = next(captured for captured in GROUP_SETS if groups <= captured)
        graph = self._graph(size, covering)
        arrays = self._arrays(items, segments, size, pending)
        self._staging.copy(arrays, self._inputs)
        if pending is not None:
            token_ids, *_, places = unpack(self._inputs, arrays)
            pending.put_into(token_ids, places[:, : pending.places.shape[1]])
        graph.replay()
        self.num_replays += 1
        return self._logits[: len(items)]

    def _arrays(
        self,
        items: Sequence[BatchItem],
        segments: LoraSegments | None,
        size: int,
        pending: Pending | None = None,
    ) -> tuple[Array, ...]:
        """`size` rows' token ids, positions, cache rows, context lengths, page tables, chunks and places of
        pending tokens."""
        token_ids, positions = np.zeros((2, size), np.int64)
        slots = np.full(size, self._spec.scratch_page * self._cache.page_size)
        context_lens = np.ones(size, np.int32)
        page_tables = np.full((size, self._num_pages), self._spec.scratch_page, np.int32)
        chunks = np.tile(np.array([0, 0, -1], np.int32), (size, 1))
        if num := len(items):
            rows = StepRows.of(items, self._cache.page_size)
            token_ids[:num], positions[:num], slots[:num] = rows.token_ids, rows.positions, rows.slot_mapping
            context_lens[:num] = rows.context_lens
            page_tables[:num, : rows.page_tables.shape[1]] = rows.page_tables
        if segments is not None:
            own = lora_chunks(segments, self._spec.decode_form)
            chunks[: len(own)] = own
        places = np.zeros((2, size), np.int64)
        if pending is not None:
            places[:, : pending.places.shape[1]] = pending.places
        return token_ids, positions, slots, context_lens, page_tables, chunks, places

    def _graph(self, size: int, groups: frozenset[str]) -> Graph:
        """Captured now, where it is not there yet."""
        if (size, groups) not in self._graphs:
            self._graphs[size, groups] = self._capture(size, groups)
        return self._graphs[size, groups]

    def _capture(self, size: int, groups: frozenset[str]) -> Graph:
        arrays = self._arrays([], None, size)
        self._staging.copy(arrays, self._inputs)
        token_ids, positions, slots, context_lens, page_tables, chunks, _ = unpack(self._inputs, arrays)
        nothing = torch.empty(0, 4, dtype=torch.int32, device=context_lens.device)
        tiles = AttentionTiles(context_lens, nothing, nothing[:, 0], 0, True, self._spec.max_context)
        indptr = list(range(size + 1))
        meta = AttentionMetadata(
            size, indptr, [1] * size, page_tables, slots, self._cache.page_size, brought=tiles
        )
        lora = None
        if groups:
            segments = LoraSegments(indptr, [-1] * size)
            segments.batches[chunks.device] = LoraBatch(chunks, self._spec.decode_form, MAX_RANK)
            lora = DeviceLora(self._pool, segments, self._spec.out_offsets, groups)
        rows, logits = self._rows[:size], self._logits[:size]

        def run() -> None:
            logits.copy_(self._decoder.forward(token_ids, positions, self._cache, meta, rows, lora))

        return self._backend.capture(run)
