"""The base model with one adapter's products added to its weights, a projection group after another.

While a group is folded, rows of that adapter need nothing more there, and all others are served by
difference: the adapter's product is taken from theirs again (dLoRA, Wu et al., OSDI 2024). Its B has the
other sign meanwhile, and stands in a row of the pool's table that is for this alone (`DevicePool.turn`): a
step takes its adapters from the table as ever, whichever groups are folded when it runs.

    W ── kept in host memory ──────────────┐
    W + Bᵀ A, in the place of W            └── copied back: W again, bit for bit
    fold_next ────────────────── serves ────────────── unfold_last

What is changed stays where it is, so that captured steps stay valid, and is changed in the order of the
device's work: steps that are queued see what was there before.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from toppings.adapters.device_pool import DevicePool
from toppings.core import GROUPS, BatchItem
from toppings.engine.step_inputs import joined_segments
from toppings.model.decoder import Decoder
from toppings.ops.linear import Linear
from toppings.ops.lora import LoraForm, LoraSegments


class Piece(NamedTuple):
    """What is folded at once: a projection group of a layer."""

    layer: int
    group: str
    linear: Linear


class FoldedBase:
    """Nothing is folded at first. Called by the engine's thread, between steps.

    Raises ValueError for a model whose weights cannot be changed in place.
    """

    def __init__(
        self, decoder: Decoder, pool: DevicePool, out_offsets: Mapping[str, Sequence[int]], form: LoraForm
    ) -> None:
        self._pool, self._out_offsets, self._form = pool, out_offsets, form
        self._device = decoder.device
        groups = [group for group in GROUPS if not decoder.config.has_experts or group in ("qkv", "o")]
        self.all_pieces = [
            Piece(layer, group, _changeable(decoder.projection(layer, group)))
            for layer in range(decoder.config.num_layers)
            for group in groups
        ]
        self.adapter_id: int | None = None
        self._slot = -1
        self._pieces: list[Piece] = []
        self._kept: list[Tensor] = []  # of the first pieces, which are folded: their weights as they were

    @property
    def num_folded(self) -> int:
        return len(self._kept)

    @property
    def num_pieces(self) -> int:
        """Of the adapter."""
        return len(self._pieces)

    @property
    def is_whole(self) -> bool:
        """The adapter's rows need nothing but the base model's weights."""
        return self.adapter_id is not None and len(self._kept) == len(self._pieces)

    @property
    def kept_bytes(self) -> int:
        """Of host memory."""
        return sum(kept.nbytes for kept in self._kept)

    def needed_bytes(self, slot: int | None = None) -> int:
        """Of host memory, for what an adapter changes, or for all that one may change."""
        pieces = self.all_pieces if slot is None else self.pieces_of(slot)
        return sum(_stored(piece).nbytes for piece in pieces)

    def begin(self, adapter_id: int, slot: int) -> None:
        """The adapter is on the device and has A and B alone."""
        assert self.adapter_id is None
        self.adapter_id, self._slot, self._pieces = adapter_id, slot, self.pieces_of(slot)

    def end(self) -> None:
        assert not self._kept
        self.adapter_id, self._slot, self._pieces = None, -1, []

    @torch.inference_mode()
    def fold_next(self) -> None:
        """Where it raises, nothing has changed: ValueError for sums that are not finite, or out of memory."""
        piece = self._pieces[len(self._kept)]
        folded = piece.linear.with_products(self._products(piece, self._slot))
        stored = _stored(piece)
        kept = torch.empty(stored.shape, dtype=stored.dtype, pin_memory=stored.device.type == "cuda")
        kept.copy_(stored)
        stored.copy_(folded)
        self._pool.turn(self._slot, piece.layer, GROUPS[piece.group])
        self._kept.append(kept)
        self.finish()

    @torch.inference_mode()
    def unfold_last(self) -> None:
        piece = self._pieces[len(self._kept) - 1]
        _stored(piece).copy_(self._kept[-1])
        self._pool.turn(self._slot, piece.layer, GROUPS[piece.group])
        self.finish()
        self._kept.pop()

    @torch.inference_mode()
    def try_out(self, slot: int) -> float:
        """Computes some of an adapter's folded weights, to be timed, and throws them away; their share of all
        of them, by bytes, 1 where it has none."""
        pieces = self.pieces_of(slot)
        if not pieces:
            return 1.0
        pieces[0].linear.with_products(self._products(pieces[0], slot))
        self.finish()
        return _stored(pieces[0]).nbytes / self.needed_bytes(slot)

    # --- for the model runner ---

    def own_slots(self, slots: dict[int, int]) -> dict[int, int]:
        """Slots by adapter id; -1, nothing to add, where the adapter is wholly in the weights."""
        if self.adapter_id in slots and self.is_whole:
            return {**slots, self.adapter_id: -1}
        return slots

    def minus(self, items: Sequence[BatchItem]) -> LoraSegments | None:
        """Rows from which the folded adapter's products are to be taken; None where there are none."""
        if not self._kept or all(item.adapter_id == self.adapter_id for item in items):
            return None
        slot, max_rank = self._pool.minus_slot, self._pool.max_rank_of([self._slot])
        runs = [(-1 if item.adapter_id == self.adapter_id else slot, item.num_rows) for item in items]
        return joined_segments(runs, max_rank, self._form)

    def pieces_of(self, slot: int) -> list[Piece]:
        """What the adapter in a slot changes."""
        return [piece for piece in self.all_pieces if self._modules(piece, slot)]

    def _modules(self, piece: Piece, slot: int) -> list[int]:
        ranks = self._pool.ranks_of(slot, piece.layer)
        return [module for module in GROUPS[piece.group] if ranks[module]]

    def _products(self, piece: Piece, slot: int) -> list[tuple[int, Tensor, Tensor]]:
        starts = dict(zip(GROUPS[piece.group], self._out_offsets[piece.group], strict=True))
        modules = self._modules(piece, slot)
        return [(starts[m], *self._pool.product(slot, piece.layer, m)) for m in modules]

    def finish(self) -> None:
        """Of the device's work, so that what it takes can be told, and does not pile up."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _changeable(linear: object) -> Linear:
    if not isinstance(linear, Linear):
        raise ValueError("the base model's weights are quantised")
    if linear.stored is None:
        raise ValueError("torch does not tell where it has packed the base model's weights")
    return linear


def _stored(piece: Piece) -> Tensor:
    stored = piece.linear.stored
    assert stored is not None
    return stored
