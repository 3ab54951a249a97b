"""Experts whose projections are stored in floats of 4 bits with a power of two for every 32 inputs: gpt-oss,
in the format MXFP4 of the Open Compute Project's "Microscaling Formats (MX) Specification".

A projection of all experts is two tensors of bytes: `<name>_blocks` [E, out, in / 32, 16], two values e2m1 a
byte, the lower four bits first, and `<name>_scales` [E, out, in / 32], e8m0: a value counts 2^(scale - 127)
times. bfloat16 holds every such product, but for the smallest ones. The values are not evenly spaced, so the
forms for integers of 4 bits do not hold them.
"""

from typing import Any

import torch
from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"
_BLOCK_BYTES = 16
_BIAS = 127
_NAN = 255
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-each for each in _MAGNITUDES))  # by code: the highest bit is the sign
_PAIRS = torch.tensor([(low, high) for high in _VALUES for low in _VALUES])
"""By byte."""


def unpacked(places: dict[str, Any]) -> dict[str, Any]:
    """`places` (open file by tensor name) with the projections under their ordinary names, which are made as
    they are asked for. Raises ValueError where scales are missing or do not fit."""
    found = {
        (base := name.removesuffix(BLOCKS)): Stacked(base, places) for name in places if name.endswith(BLOCKS)
    }
    parts = {base + part for base in found for part in (BLOCKS, SCALES)}
    return {name: file for name, file in places.items() if name not in parts} | found


class Stacked:
    """One projection of all experts, as a file and as a tensor's slice of it: [E, in, out]."""

    def __init__(self, base: str, places: dict[str, Any]) -> None:
        self._base = base
        if base + SCALES not in places:
            raise ValueError(f"{base}{SCALES} is missing beside {base}{BLOCKS}")
        self._blocks, self._scales = (places[base + part].get_slice(base + part) for part in (BLOCKS, SCALES))
        blocks, scales = list(self._blocks.get_shape()), list(self._scales.get_shape())
        types = {self._blocks.get_dtype(), self._scales.get_dtype()}
        if len(blocks) != 4 or blocks != [*scales, _BLOCK_BYTES] or types != {"U8"}:
            raise ValueError(
                f"{base}: scales of shape {scales} do not fit blocks of shape {blocks}, as bytes"
                f" [experts, out, in / 32] and [experts, out, in / 32, {_BLOCK_BYTES}] would (mxfp4)"
            )
        num, num_out, num_blocks, _ = blocks
        self._shape = [num, num_blocks * 2 * _BLOCK_BYTES, num_out]

    def get_slice(self, name: str) -> "Stacked":
        return self

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return "BF16"

    def get_tensor(self, name: str) -> Tensor:
        return self[:]

    def __getitem__(self, experts: slice) -> Tensor:
        """fp32 [n, in, out]: exactly what the codes of some experts stand for. Raises ValueError where a
        scale is no number."""
        blocks, scales = self._blocks[experts], self._scales[experts]
        if (scales == _NAN).any():
            raise ValueError(f"{self._base}{SCALES} has a scale of {_NAN}, which is no number")
        values = torch.nn.functional.embedding(blocks.int(), _PAIRS).flatten(-2)  # [n, out, in / 32, 32]
        return torch.ldexp(values, scales[..., None].int() - _BIAS).flatten(2).transpose(1, 2)
