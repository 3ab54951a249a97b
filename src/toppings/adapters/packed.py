"""An adapter in one file, in the device's layout and dtype: a checked header, then one block per layer.

    magic (8 bytes) | header length, header CRC-32 (uint32 each) | header (JSON) | padding to 64 | blocks

The header holds the layout, a CRC-32 per block, the digest and fingerprint of the checkpoint that the file
was made from, its own chat template if it has one, and the scales that B holds, where A and B are those that
PEFT has saved; the adapter's name is not in it. Whoever makes a file renames it when it is whole.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toppings.adapters.checkpoint import AdapterCheckpoint
from toppings.adapters.errors import AdapterError
from toppings.adapters.layout import BLOCK_ALIGNMENT_BYTES, DTYPE_BYTES, AdapterLayout
from toppings.adapters.regular_files import open_regular
from toppings.core import MODULES

if TYPE_CHECKING:
    import torch

_MAGIC = b"TOPPACK1"  # the last character is the version
_PREFIX = struct.Struct("<8sII")
_MAX_HEADER_BYTES = 64 << 20
MAX_EFFECT = 1e17
"""Of a product of A and scaled B: a larger one overflows fp32 where the next norm squares it."""


class PackedFileError(AdapterError):
    """The packed file is missing or damaged; it can be made again from the checkpoint."""


@dataclass(frozen=True)
class PackedHeader:
    """`scales`: of each layer's modules, 0 where not targeted; None where A and B are not those that PEFT has
    saved."""

    layout: AdapterLayout
    block_crcs: tuple[int, ...]
    digest: str
    fingerprint: str
    chat_template: str | None = None
    scales: tuple[tuple[float, ...], ...] | None = None

    def to_bytes(self, num_bytes: int = 0) -> bytes:
        """Magic, lengths and JSON, padded so that the first block is aligned, or to `num_bytes`."""
        fields = {
            "layout": json.loads(self.layout.to_json()),
            "block_crcs": self.block_crcs,
            "digest": self.digest,
            "fingerprint": self.fingerprint,
            "chat_template": self.chat_template,
            "scales": self.scales,
        }
        text = json.dumps(fields).encode().ljust(num_bytes - _PREFIX.size)
        data = _PREFIX.pack(_MAGIC, len(text), zlib.crc32(text)) + text
        return data.ljust(_pad(len(data)), b"\0")

    @classmethod
    def from_json(cls, text: bytes) -> "PackedHeader":
        fields = json.loads(text)
        layout = AdapterLayout.from_json(json.dumps(fields["layout"]))
        named = {name: fields[name] for name in ("digest", "fingerprint")}
        scales = None if (each := fields.get("scales")) is None else tuple(map(tuple, each))
        crcs, template = tuple(fields["block_crcs"]), fields.get("chat_template")
        return cls(layout, crcs, **named, chat_template=template, scales=scales)


def _pad(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_ALIGNMENT_BYTES) * BLOCK_ALIGNMENT_BYTES


def pack_weights(checkpoint: AdapterCheckpoint, dtype: str) -> tuple[AdapterLayout, "torch.Tensor"]:
    """The layout and all its blocks, 1-D of `dtype`; padding is 0. B holds scale * B, rounded once from fp32.

    Raises AdapterError where a value overflows `dtype`, or the adapter's effect would.
    """
    import torch

    extras = [checkpoint.extras(layer) for layer in range(checkpoint.shapes.num_layers)]
    named = [tuple((name, _stored_shape(tensor, dtype)) for name, tensor in each.items()) for each in extras]
    layout = AdapterLayout.build(checkpoint.ranks(), checkpoint.shapes, dtype, named)
    blocks = torch.from_numpy(np.zeros(layout.num_bytes, np.uint8)).view(getattr(torch, dtype))
    for (layer, module), weights in checkpoint.weights.items():
        place = layout.layers[layer]
        start = layout.layer_offset_bytes(layer) // layout.item_bytes
        a_start, b_start = start + place.a_offsets[module], start + place.b_offsets[module]
        scaled = (weights.b.float() * weights.scale).T.reshape(-1)
        where = f"adapter {checkpoint.path}: layer {layer} {MODULES[module]}"
        check_magnitudes(where, weights.a, scaled, f" with its scale of {weights.scale:.3g}", dtype)
        blocks[a_start : a_start + weights.a.numel()] = weights.a.reshape(-1)
        blocks[b_start : b_start + scaled.numel()] = scaled
    for layer, each in enumerate(extras):
        for name, tensor in each.items():
            if tensor.is_floating_point():
                _check_extra(checkpoint, layer, name, tensor, dtype)
            values = tensor.reshape(-1) if tensor.is_floating_point() else tensor.view(blocks.dtype)  # bits
            offset, _ = layout.layers[layer].find_extra(name) or (0, ())
            start = layout.layer_offset_bytes(layer) // layout.item_bytes + offset
            blocks[start : start + values.numel()] = values
    return layout, blocks


def _stored_shape(tensor: "torch.Tensor", dtype: str) -> tuple[int, ...]:
    """In elements of `dtype`, which integers are seen through."""
    import torch

    if tensor.dtype is torch.int32:
        return (tensor.numel() * tensor.itemsize // DTYPE_BYTES[dtype],)
    return tuple(tensor.shape)


def _check_extra(
    checkpoint: AdapterCheckpoint, layer: int, name: str, tensor: "torch.Tensor", dtype: str
) -> None:
    import torch

    limit = min(torch.finfo(getattr(torch, dtype)).max, MAX_EFFECT)
    if tensor.numel() and not (largest := _largest(tensor)) <= limit:
        raise AdapterError(
            f"adapter {checkpoint.path}: layer {layer} {name} holds {largest:.3g}; above {limit:.3g} the "
            f"model's arithmetic in {dtype} overflows"
        )


def check_magnitudes(where: str, a: "torch.Tensor", b: "torch.Tensor", scaled: str, dtype: str) -> None:
    """`b`: with its scale, fp32, as `scaled` says. Raises AdapterError where `dtype` cannot hold them, or
    not the adapter's effect. By numpy, as torch would wake its threads for each small tensor."""
    import torch

    limit = torch.finfo(getattr(torch, dtype)).max
    largest_a, largest_b = _largest(a), _largest(b)
    if not max(largest_a, largest_b) <= limit:
        raise AdapterError(
            f"{where} holds {max(largest_a, largest_b):.3g}{scaled}, more than {dtype} can hold"
        )
    if not largest_a * largest_b <= min(limit, MAX_EFFECT):
        raise AdapterError(
            f"{where} gives products of {largest_a * largest_b:.3g}{scaled} "
            f"(lora_alpha or alpha_pattern); above {min(limit, MAX_EFFECT):.3g} the model's arithmetic in "
            f"{dtype} overflows"
        )


def _largest(tensor: "torch.Tensor") -> float:
    """The largest magnitude; NaN where there is one."""
    import torch

    if tensor.dtype is torch.bfloat16:  # magnitudes are in the order of their bits
        bits = (tensor.view(torch.int16).numpy() & 0x7FFF).max()
        return float((np.uint32(bits) << np.uint32(16)).view(np.float32))
    values = tensor.numpy()
    return max(abs(float(values.max())), abs(float(values.min())))


def pack_adapter(
    checkpoint: AdapterCheckpoint, dtype: str, file: str | Path, *, is_synced: bool = True
) -> PackedHeader:
    """Writes `file`, which must not exist yet; `is_synced`: flushed to the disk.

    Raises AdapterError where a value overflows `dtype`, OSError where the disk is full.
    """
    import torch

    layout, blocks = pack_weights(checkpoint, dtype)
    data = blocks.view(torch.uint8).numpy().data
    header = PackedHeader(
        layout,
        (),
        checkpoint.digest,
        checkpoint.fingerprint,
        checkpoint.chat_template,
        _scales(checkpoint) if checkpoint.is_plain else None,
    )
    parts = (_block(data, layout, layer) for layer in range(layout.num_layers))
    return write_packed(header, parts, file, is_synced=is_synced)


def write_packed(
    header: PackedHeader, blocks: Iterable[memoryview], file: str | Path, *, is_synced: bool
) -> PackedHeader:
    """Writes the layers' blocks as they come, then the header, which has their checksums; else as
    `pack_adapter`."""
    reserved = len(replace(header, block_crcs=(2**32 - 1,) * header.layout.num_layers).to_bytes())
    crcs = []
    with open(file, "xb") as out:
        out.seek(reserved)
        for block in blocks:
            crcs.append(zlib.crc32(block))
            out.write(block)
        header = replace(header, block_crcs=tuple(crcs))
        out.seek(0)
        out.write(header.to_bytes(reserved))
        if is_synced:
            out.flush()
            os.fsync(out.fileno())
    return header


def _scales(checkpoint: AdapterCheckpoint) -> tuple[tuple[float, ...], ...]:
    scales = [[0.0] * len(MODULES) for _ in range(checkpoint.shapes.num_layers)]
    for (layer, module), weights in checkpoint.weights.items():
        scales[layer][module] = weights.scale
    return tuple(map(tuple, scales))


def _block(data: memoryview, layout: AdapterLayout, layer: int) -> memoryview:
    start = layout.layer_offset_bytes(layer)
    return data[start : start + layout.layer_bytes(layer)]


class PackedAdapter:
    """An open packed file; `read_layer` may be called from one thread at a time."""

    def __init__(self, fd: int, file: str, header: PackedHeader, data_start: int) -> None:
        self._fd = fd
        self._file = file
        self._data_start = data_start
        self.header = header

    @property
    def layout(self) -> AdapterLayout:
        return self.header.layout

    @classmethod
    def open(cls, file: str | Path) -> "PackedAdapter":
        """Raises PackedFileError where it is missing, of another version, cut short or its header damaged."""
        try:
            with open_regular(file) as stream:
                fd = os.dup(stream.fileno())
        except OSError as error:
            raise PackedFileError(f"cannot open packed adapter {file}: {error}") from error
        try:
            header, data_start = _read_header(fd)
            expected = data_start + header.layout.num_bytes
            if (size := os.fstat(fd).st_size) != expected:
                raise PackedFileError(f"it has {size} bytes instead of {expected}")
        except (PackedFileError, OSError, ValueError, KeyError, TypeError) as error:
            os.close(fd)
            raise PackedFileError(f"packed adapter {file} is damaged: {error}") from error
        return cls(fd, str(file), header, data_start)

    def read_layer(self, layer: int, into: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        """Fills `into` (uint8, as long as the block). Raises PackedFileError where the content is damaged."""
        layout = self.layout
        assert len(into) == layout.layer_bytes(layer)
        view = into.data
        try:
            num_read = _pread_all(self._fd, view, self._data_start + layout.layer_offset_bytes(layer))
        except OSError as error:
            raise PackedFileError(f"cannot read packed adapter {self._file}: {error}") from error
        if num_read != len(into) or zlib.crc32(view) != self.header.block_crcs[layer]:
            raise PackedFileError(f"packed adapter {self._file} is damaged in layer {layer}")

    def check(self) -> None:
        """Reads all layers. Raises PackedFileError where the content is damaged."""
        for layer in range(self.layout.num_layers):
            self.read_layer(layer, np.empty(self.layout.layer_bytes(layer), np.uint8))

    def close(self) -> None:
        """A second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "PackedAdapter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_header(fd: int) -> tuple[PackedHeader, int]:
    prefix = os.pread(fd, _PREFIX.size, 0)
    if len(prefix) != _PREFIX.size:
        raise PackedFileError("it is cut short")
    magic, length, crc = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise PackedFileError(f"it starts with {magic!r} instead of {_MAGIC!r}")
    if length > _MAX_HEADER_BYTES:
        raise PackedFileError(f"its header claims {length} bytes")
    text = os.pread(fd, length, _PREFIX.size)
    if len(text) != length or zlib.crc32(text) != crc:
        raise PackedFileError("its header fails its checksum")
    return PackedHeader.from_json(text), _pad(_PREFIX.size + length)


def _pread_all(fd: int, view: memoryview, offset: int) -> int:
    """Bytes read: fewer than asked only at the end of the file."""
    done = 0
    while done < len(view):
        num = os.preadv(fd, [view[done:]], offset + done)
        if num == 0:
            break
        done += num
    return done


def check_packed(file: str | Path) -> PackedHeader:
    """The header of a file whose blocks were all read and found whole. Raises PackedFileError."""
    with PackedAdapter.open(file) as packed:
        for layer in range(packed.layout.num_layers):
            packed.read_layer(layer, np.empty(packed.layout.layer_bytes(layer), np.uint8))
        return packed.header
