"""How a step's work is shared out over the programs of the Triton kernels, worked out on the host.

No Triton here: whoever brings a step's inputs to the device in one copy (engine/step_inputs.py) asks for
`attention_arrays` and `lora_chunks` and says with `AttentionTiles.of` and `LoraBatch` where they have come.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from toppings.ops.attention import AttentionMetadata
    from toppings.ops.lora import LoraForm, LoraSegments

QUERIES = 64
"""Queries of one program of the prefill attention."""

SPLIT_KEYS = 256
"""Keys that a split of a decode's context has, unless there would be more than `MAX_SPLITS`."""

MAX_SPLITS = 64

RANK_ROOM = 16
"""Shrunk rows have room for ranks in multiples of it, so that where they begin is known to be aligned."""

_SPLIT_INPUTS = 1024  # inputs that one split of a shrink goes over, at least

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class AttentionTiles:
    """What the kernels read about a step's sequences, on the device.

    `context_lens`: int32 [S]. `prefill_tiles`: int32 [N, 4], (first row, row after the last, sequence,
    position of the first row's token) of up to 64 neighbouring queries. `prefill_indptr`: int32, the prompts'
    rows, counted from the first prompt's. `max_decode_context` bounds the decodes' contexts. `splits`: int32
    [N, 4], (sequence, first key, key after the last, place) of the parts that the decodes' contexts are read
    in, those with most keys first; places are in the order of sequences and keys, -1 where a context has one
    split alone. `split_indptr`: int32 [decodes + 1] delimits each decode's places. Rows of `splits` beyond
    the last of them say nothing."""

    context_lens: Tensor
    prefill_tiles: Tensor
    prefill_indptr: Tensor
    splits: Tensor
    split_indptr: Tensor
    longest_prefill: int
    are_prefills_whole: bool
    max_decode_context: int

    @classmethod
    def build(cls, meta: "AttentionMetadata") -> "AttentionTiles":
        return cls.of(meta, [to_device(array, meta.page_tables.device) for array in attention_arrays(meta)])

    @classmethod
    def of(cls, meta: "AttentionMetadata", arrays: Sequence[Tensor]) -> "AttentionTiles":
        """`arrays`: those of `attention_arrays`, on the device."""
        context_lens, tiles, indptr, splits, split_indptr = arrays
        lengths = [stop - start for start, stop in pairwise(meta.query_indptr[meta.num_decodes :])]
        return cls(
            context_lens,
            tiles,
            indptr,
            splits,
            split_indptr,
            max(lengths, default=0),
            lengths == meta.context_lens[meta.num_decodes :],
            max(meta.context_lens[: meta.num_decodes], default=0),
        )


def attention_arrays(meta: "AttentionMetadata") -> list[Ints]:
    """The arrays of `AttentionTiles`, in their order."""
    starts = meta.query_indptr[meta.num_decodes :]
    context_lens = np.array(meta.context_lens, np.int32)
    return [
        context_lens,
        prefill_tiles(meta.num_decodes, meta.query_indptr, meta.context_lens),
        np.array(starts, np.int32) - starts[0],
        *decode_splits(context_lens[: meta.num_decodes]),
    ]


def decode_splits(context_lens: Ints) -> tuple[Ints, Ints]:
    """`splits` and `split_indptr` of `AttentionTiles`. How a context is split depends on its length alone, so
    that a row's bits do not depend on who else is in the batch."""
    doublings = np.frexp(np.maximum(-(-context_lens // (MAX_SPLITS * SPLIT_KEYS)) - 1, 0))[1]
    lengths = SPLIT_KEYS << doublings  # the least power of two with which there are not too many
    counts = -(-context_lens // lengths)
    indptr = np.concatenate(([0], np.cumsum(counts)))
    sequences = np.repeat(np.arange(len(context_lens)), counts)
    places = np.arange(indptr[-1])
    low = (places - indptr[sequences]) * lengths[sequences]
    high = np.minimum(low + lengths[sequences], context_lens[sequences])
    places = np.where(counts[sequences] > 1, places, -1)
    splits = np.stack((sequences, low, high, places), axis=1).astype(np.int32)
    return splits[np.argsort(low - high, kind="stable")], indptr.astype(np.int32)


def most_splits(num_sequences: int, max_context: int) -> int:
    """Of any `num_sequences` contexts of up to `max_context` tokens."""
    return num_sequences * min(MAX_SPLITS, -(-max_context // SPLIT_KEYS))


def prefill_tiles(num_decodes: int, query_indptr: Sequence[int], context_lens: Sequence[int]) -> Ints:
    """int32 [N, 4], those of `AttentionTiles`, of the sequences after the decodes."""
    tiles: list[tuple[int, int, int, int]] = []
    for s in range(num_decodes, len(context_lens)):
        start, stop = query_indptr[s], query_indptr[s + 1]
        past = context_lens[s] - (stop - start)
        tiles += [
            (row, min(row + QUERIES, stop), s, past + row - start) for row in range(start, stop, QUERIES)
        ]
    tiles.sort(key=lambda tile: -tile[3])  # those with most keys first: they take longest
    return np.array(tiles, np.int32).reshape(-1, 4)


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one form: `depth` inputs per step of the shrink, `columns` outputs per expand program,
    which goes over `expand_ranks` at a time."""

    rows: int
    ranks: int
    expand_ranks: int
    depth: int
    columns: int
    max_splits: int
    shrink_warps: int
    expand_warps: int
    stages: int
    expand_stages: int

    def splits(self, num_in: int) -> int:
        """Parts of the input; depends on the model alone, never on the batch."""
        return max(1, min(self.max_splits, num_in // _SPLIT_INPUTS))


TILES: "dict[LoraForm, Tiles]" = {
    "sgmv": Tiles(64, 64, 32, 64, 128, 4, 4, 8, 3, 1),
    "mbgmv": Tiles(16, 16, 32, 128, 128, 8, 4, 4, 4, 3),
    "bgmv": Tiles(1, 16, 16, 256, 128, 8, 4, 4, 3, 3),
}
FP32_TILES: "dict[LoraForm, Tiles]" = {
    "sgmv": Tiles(64, 32, 32, 32, 64, 4, 8, 8, 2, 1),
    "mbgmv": Tiles(16, 16, 16, 64, 128, 8, 4, 4, 3, 2),
    "bgmv": TILES["bgmv"],
}
"""Twice the bytes and, on tensor cores, three products: what fits every chip without spills. Chunks are as
long as with the others."""


@dataclass(frozen=True)
class LoraBatch:
    """A step's chunks on the device: int32 [C, 3], (start, stop, slot) each. Slot -1: nothing to do, so that
    a graph of C chunks serves fewer. `max_rank` bounds the ranks of all adapters that may ever be named."""

    chunks: Tensor
    form: "LoraForm"
    max_rank: int

    @property
    def rank_room(self) -> int:
        """What shrunk rows have for each module."""
        return -(-self.max_rank // RANK_ROOM) * RANK_ROOM

    def tiles(self, dtype: torch.dtype) -> Tiles:
        return (FP32_TILES if dtype == torch.float32 else TILES)[self.form]

    @classmethod
    def build(
        cls, segments: "LoraSegments", device: torch.device, form: "LoraForm | None" = None
    ) -> "LoraBatch":
        """`form`: by default the segments' own."""
        form = form or segments.form
        return cls(to_device(lora_chunks(segments, form), device), form, segments.max_rank)


def lora_chunks(segments: "LoraSegments", form: "LoraForm") -> Ints:
    """int32 [C, 3]: (start, stop, slot) of each chunk of the segments."""
    num_rows = TILES[form].rows
    chunks = [
        (first, min(first + num_rows, stop), slot)
        for start, stop, slot in segments.adapted
        for first in range(start, stop, num_rows)
    ]
    return np.array(chunks, np.int32).reshape(-1, 3)


def to_device(array: Ints, device: torch.device) -> Tensor:
    """`array` on the device, without making the host wait for it."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
