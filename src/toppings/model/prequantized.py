"""Checkpoints whose projections are stored in 4 or 8 bits: GPTQ, AWQ and compressed-tensors, read as the
weights that they stand for, or as `ops/quantized.py` keeps such.

Each stores a projection as integers, packed into 32-bit words (W is [out, in], words hold their lowest bits
first), with a scale and perhaps a zero point for each group of inputs: W = scale · (code - zero).

* gptq: codes `qweight` [in / 8, out]; zeros `qzeros` [groups, out / 8], one less than they are but in
  "gptq_v2"; scales [groups, out]; `g_idx` [in], each input's group.
* awq: `qweight` [in, out / 8], a word's outputs in the order 0 2 4 6 1 3 5 7; `qzeros` likewise; scales
  [groups, out].
* compressed-tensors, pack-quantized: `weight_packed` [out, in / 8 or 4], whose middle code is the zero;
  scales [out, groups].
* compressed-tensors, int-quantized: `weight` [out, in], int8; scales [out, groups].

Another, mxfp4, is of floats of 4 bits (`mxfp4.py`).
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toppings.model import mxfp4
from toppings.model.files import open_tensors, read_json
from toppings.ops.quantized import GROUP, GROUPS, QuantizedWeight, pack_nibbles

METHODS = ("gptq", "awq", "compressed-tensors", "mxfp4")
_WORD_BITS = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_CODES = {"gptq": "qweight", "awq": "qweight", "pack-quantized": "weight_packed", "int-quantized": "weight"}
_HALVES = ("F16", "BF16")
_BESIDE = ("qzeros", "scales", "g_idx", "weight_scale", "weight_shape")


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint's projections are stored. `form`: a key of `_CODES`, or "mxfp4"; `zero_shift` is added
    to stored zeros."""

    form: str
    bits: int
    zero_shift: int = 0

    @classmethod
    def of(cls, config: Any) -> "Scheme":
        """`config`: the `quantization_config` of a config.json. Raises ValueError for what is not read."""
        method = config.get("quant_method", "unknown") if isinstance(config, dict) else config
        if method == "compressed-tensors":
            return cls._compressed(config)
        if method not in METHODS:
            raise ValueError(f"it is quantized ({method}); of quantized ones, {', '.join(METHODS)} are read")
        if method == "mxfp4":
            return cls("mxfp4", 4)
        if (bits := config.get("bits", config.get("w_bit"))) != 4:
            raise ValueError(f"{method} with bits {bits!r} is not read, only with 4")
        if method == "awq":
            if (version := str(config.get("version", "gemm")).lower()) != "gemm":
                raise ValueError(f"awq of version {version!r} is not read, only gemm")
            return cls("awq", 4)
        return cls("gptq", 4, 0 if config.get("checkpoint_format") == "gptq_v2" else 1)

    @classmethod
    def _compressed(cls, config: dict[str, Any]) -> "Scheme":
        groups = list((config.get("config_groups") or {}).values())
        if len(groups) != 1:
            raise ValueError(f"compressed-tensors with {len(groups)} config_groups is not read, only one")
        if not isinstance(groups[0], dict):
            raise ValueError(f"compressed-tensors with config_groups of {groups[0]!r} is not read")
        weights, form = groups[0].get("weights") or {}, config.get("format")
        bits, kind = weights.get("num_bits"), weights.get("type")
        is_known = (form == "pack-quantized" and bits in (4, 8)) or (form == "int-quantized" and bits == 8)
        if not is_known or kind != "int" or not weights.get("symmetric", True):
            raise ValueError(
                f"compressed-tensors of format {form!r} with {bits} bits, type {kind!r} and symmetric"
                f" {weights.get('symmetric')} is not read, only symmetric integers: pack-quantized with 4 or"
                " 8 bits, int-quantized with 8"
            )
        if groups[0].get("input_activations") is not None:
            raise ValueError("compressed-tensors with quantized activations (W8A8) is not read, only weights")
        return cls(str(form), 8 if bits == 8 else 4)


class NotHeldError(ValueError):
    """The forms of weights of 8 and 4 bits do not hold what a projection stands for; the message says why."""


def open_weights(path: Path, stack: ExitStack) -> dict[str, Any]:
    """As `open_tensors`, with quantised projections under their ordinary names. Raises ValueError."""
    places = open_tensors(path, stack)
    quantization = read_json(path / "config.json").get("quantization_config")
    return unpacked(Scheme.of(quantization), places) if quantization else places


def unpacked(scheme: Scheme, places: dict[str, Any]) -> dict[str, Any]:
    """`places` (open file by tensor name) with the projections under their ordinary names, which are made as
    they are asked for. Raises ValueError where a projection's parts are missing or do not fit."""
    if scheme.form == "mxfp4":
        return mxfp4.unpacked(places)
    suffix = "." + _CODES[scheme.form]
    scales = ".weight_scale" if "quantized" in scheme.form else ".scales"
    bases = [name.removesuffix(scales) for name in places if name.endswith(scales)]
    found = {base + ".weight": Packed(scheme, base, places) for base in bases if base + suffix in places}
    parts = {f"{base}.{part}" for base in bases for part in (_CODES[scheme.form], *_BESIDE)}
    return {name: file for name, file in places.items() if name not in parts} | found


class Packed:
    """One projection, as a file and as a tensor's slice of it."""

    def __init__(self, scheme: Scheme, base: str, places: dict[str, Any]) -> None:
        self._scheme, self._base, self._places = scheme, base, places
        by_input = scheme.form in ("gptq", "awq")
        self._scales = self._slice("scales" if by_input else "weight_scale")
        codes = self._slice(_CODES[scheme.form]).get_shape()
        per_word = _WORD_BITS // scheme.bits
        if scheme.form == "gptq":
            self._shape = (codes[1], codes[0] * per_word)
        elif scheme.form == "awq":
            self._shape = (codes[1] * per_word, codes[0])
        elif scheme.form == "pack-quantized":
            self._shape = (codes[0], int(self._tensor("weight_shape")[1]))
        else:
            self._shape = (codes[0], codes[1])
        num_out, num_in = self._shape
        scales = list(self._scales.get_shape())
        num_groups = scales[0 if by_input else -1]
        expected = [num_groups, num_out] if by_input else [num_out, num_groups]
        is_packed_in = scheme.form != "pack-quantized" or codes[1] == -(-num_in // per_word)
        if scales != expected or not is_packed_in or not num_groups or num_in % num_groups:
            raise ValueError(
                f"{base}: scales of shape {scales} do not fit codes of shape {list(codes)} ({scheme.form})"
            )

    def get_slice(self, name: str) -> "Packed":
        return self

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return str(self._scales.get_dtype())

    def get_tensor(self, name: str) -> Tensor:
        """fp32 [out, in], exactly what the codes stand for."""
        codes, zeros, scales = self._parts()
        groups = self._groups(scales.shape[1])
        value: Tensor = (codes - zeros[:, groups]) * scales[:, groups]
        return value

    def quantized(self, dtype: torch.dtype) -> QuantizedWeight:
        """The codes as they are, for products with `dtype`. Raises NotHeldError."""
        codes, zeros, scales = self._parts()
        groups, num_groups = self._groups(scales.shape[1]), scales.shape[1]
        if self._scheme.bits == 8:
            if num_groups > 1:
                raise NotHeldError(f"its {num_groups} groups of 8 bits share no scale")
            return QuantizedWeight(self._shape, dtype, 8, (codes - zeros).to(torch.int8), scales)
        size = self._shape[1] // num_groups
        if size % GROUP or not (groups.bincount(minlength=num_groups) == size).all():
            raise NotHeldError(f"its groups are not of {size} inputs each, a multiple of {GROUP}")
        if self._scales.get_dtype() not in _HALVES:
            raise NotHeldError(f"its scales are of type {self._scales.get_dtype()}, not of 16 bits")
        order = groups.argsort(stable=True)
        is_ordered = bool((order.diff() > 0).all())
        group = max(each for each in GROUPS if size % each == 0)
        scales, offsets = (
            each.repeat_interleave(size // group, 1).contiguous() for each in (scales, -scales * zeros)
        )
        packed = pack_nibbles(codes if is_ordered else codes[:, order])
        places = None if is_ordered else order.int()
        return QuantizedWeight(self._shape, dtype, 4, packed, scales, offsets, group, places)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [out, in], zeros [out, groups], both integers, and scales fp32 [out, groups]."""
        form, bits = self._scheme.form, self._scheme.bits
        if form in ("gptq", "awq"):
            codes, zeros, scales = (self._tensor(part) for part in ("qweight", "qzeros", "scales"))
            if form == "gptq":
                codes, zeros = _unpack(codes.t(), bits), _unpack(zeros, bits)
            else:
                codes, zeros = (_in_order(_unpack(each, bits)) for each in (codes, zeros))
                codes = codes.t()
            if zeros.shape != scales.shape:
                raise ValueError(
                    f"{self._base}: qzeros of {list(zeros.shape)} for {list(scales.shape)} scales"
                )
            return codes, zeros.t() + self._scheme.zero_shift, scales.t().float()
        scales = self._tensor("weight_scale").float()
        if form == "int-quantized":
            return self._tensor("weight").int(), torch.zeros_like(scales, dtype=torch.int32), scales
        codes = _unpack(self._tensor("weight_packed"), bits)[:, : self._shape[1]]
        return codes, torch.full_like(scales, 2 ** (bits - 1), dtype=torch.int32), scales

    def __getitem__(self, index: Any) -> Tensor:
        return self.get_tensor("")[index]

    def _groups(self, num_groups: int) -> Tensor:
        """int64 [in]: each input's group; GPTQ may have ordered them by how much they matter."""
        num_in: int = self._shape[1]
        if f"{self._base}.g_idx" not in self._places:
            return torch.arange(num_in) // (num_in // num_groups)
        groups = self._tensor("g_idx").long()
        if groups.shape != (num_in,) or groups.min() < 0 or groups.max() >= num_groups:
            raise ValueError(f"{self._base}.g_idx must name one of {num_groups} groups for {num_in} inputs")
        return groups

    def _slice(self, part: str) -> Any:
        name = f"{self._base}.{part}"
        if name not in self._places:
            raise ValueError(f"{name} is missing beside {self._base}'s other tensors")
        return self._places[name].get_slice(name)

    def _tensor(self, part: str) -> Tensor:
        tensor: Tensor = self._slice(part)[:]
        return tensor


def _unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [n, m · 32 / bits] of int32 [n, m]: each word's codes, from its lowest bits on."""
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)
    return (words[:, :, None] >> shifts & (1 << bits) - 1).flatten(1)


def _in_order(codes: Tensor) -> Tensor:
    """Columns as AWQ's words interleave them, in their order."""
    inverse = torch.tensor(_AWQ_ORDER).argsort()
    return codes.view(len(codes), -1, len(_AWQ_ORDER))[:, :, inverse].flatten(1)
