"""Sets of token ids as bits: what a row of a step may draw.

A mask is int32 [W], W = `num_words(V)`: bit t % 32 of word t // 32 says whether token t is in it. Bits beyond
the vocabulary mean nothing.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WORD_BITS = 32
TokenMask = npt.NDArray[np.int32]


def num_words(vocab_size: int) -> int:
    return -(-vocab_size // WORD_BITS)


def mask_of(token_ids: Iterable[int], vocab_size: int) -> TokenMask:
    """The ids that are in the vocabulary."""
    flags = np.zeros(num_words(vocab_size) * WORD_BITS, np.uint8)
    flags[[t for t in token_ids if 0 <= t < vocab_size]] = 1
    words: npt.NDArray[Any] = np.packbits(flags, bitorder="little").view("<i4")
    return words.astype(np.int32, copy=False)


def flags_of(mask: TokenMask, vocab_size: int) -> npt.NDArray[np.bool_]:
    """bool [V]."""
    octets = mask.astype("<i4", copy=False).view(np.uint8)
    return np.unpackbits(octets, count=vocab_size, bitorder="little").view(np.bool_)


def device_flags(masks: Tensor, vocab_size: int) -> Tensor:
    """bool [R, V] of masks [R, W], computed where they are."""
    bits = torch.arange(WORD_BITS, dtype=torch.int32, device=masks.device)
    return ((masks[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]


def allows_more_than(mask: TokenMask, token_ids: Iterable[int], vocab_size: int) -> bool:
    """It holds a token of the vocabulary that is not among `token_ids`."""
    rest = mask & ~mask_of(token_ids, vocab_size)
    if beyond := vocab_size % WORD_BITS:
        rest[-1] &= (1 << beyond) - 1
    return bool(rest.any())
