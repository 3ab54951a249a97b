"""A safetensors file's header, checked before any tensor is read, and then the tensors that are wanted.

The library's own reader needs the whole file in memory or maps it, and a mapped file that is cut short
meanwhile ends the process. The layout: header length (uint64), header (JSON), then the tensors without gaps.
"""

import math
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from toppings.adapters.bounded_json import parse_bounded
from toppings.adapters.errors import AdapterError

if TYPE_CHECKING:
    import torch

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_HEADER_BYTES = 4 << 20
CHUNK_BYTES = 16 << 20
FLOATS = {
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
"""Types by their names in a file: their names in torch, and their bytes."""
MAX_DIMENSIONS = 8
MAX_SIZE = 2**48 - 1
"""Of a dimension, in values, and of an offset, in bytes."""
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class StoredTensor:
    """What the header says of a tensor; `start` and `end` count bytes from the end of the header."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class StoredTensors:
    """The tensors of an open file by key. Raises AdapterError where the header does not describe the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(_LENGTH.size)
        if len(prefix) < _LENGTH.size:
            raise _corrupt(f"it has {size} bytes")
        length = _LENGTH.unpack(prefix)[0]
        if length > MAX_HEADER_BYTES:
            raise _corrupt(f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
        text = file.read(length)
        if len(text) < length:
            raise _corrupt(f"its header claims {length} bytes, of which it has {len(text)}")
        self.head = prefix + text
        self.by_key = _parse(text, size - len(self.head))

    def read(self, keys: Iterable[str], note: Callable[[memoryview], object]) -> dict[str, "torch.Tensor"]:
        """Tensors of types in `FLOATS`, read in the file's order; `note` gets the bytes as they come.

        Raises AdapterError where the file has become shorter, OSError.
        """
        import torch

        tensors = {}
        for stored in sorted((self.by_key[key] for key in keys), key=lambda stored: stored.start):
            data = np.empty(stored.end - stored.start, np.uint8)
            self._file.seek(len(self.head) + stored.start)
            for start in range(0, len(data), CHUNK_BYTES):
                part = data[start : start + CHUNK_BYTES]
                if self._file.readinto(part.data) != len(part):  # type: ignore[attr-defined]
                    raise _corrupt(f"it ends within {stored.key!r}")
                note(part.data)
            tensor = (
                torch.from_numpy(data).view(getattr(torch, FLOATS[stored.dtype][0])).reshape(stored.shape)
            )
            tensors[stored.key] = tensor.float() if stored.dtype.startswith("F8") else tensor
        return tensors


def _parse(text: bytes, num_bytes: int) -> dict[str, StoredTensor]:
    try:
        header = parse_bounded(text)
        _check_metadata(header.pop("__metadata__", {}))
        fields = header
        tensors = {key: _entry(key, value) for key, value in fields.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _corrupt(f"its header is not valid: {error}") from error
    if not tensors:
        raise AdapterError(f"{WEIGHTS_FILE} holds no tensors")
    _check_places(list(tensors.values()), num_bytes)
    return tensors


def _check_metadata(metadata: Any) -> None:
    """As the format has it: texts by name."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must hold texts by name")


def _entry(key: str, value: Any) -> StoredTensor:
    start, end = value["data_offsets"]
    if len(value["shape"]) > MAX_DIMENSIONS:
        raise ValueError(
            f"{key[:200]!r} has {len(value['shape'])} dimensions; at most {MAX_DIMENSIONS} are read"
        )
    numbers = (*value["shape"], start, end)
    if not all(type(number) is int and 0 <= number <= MAX_SIZE for number in numbers) or end < start:
        raise ValueError(f"shape or offsets of {key[:200]!r} are no whole numbers from 0 to {MAX_SIZE}")
    return StoredTensor(key, str(value["dtype"]), tuple(value["shape"]), start, end)


def _check_places(tensors: list[StoredTensor], num_bytes: int) -> None:
    """Every tensor has the bytes that its shape needs, and the file has those of the tensors and no more."""
    for tensor in tensors:
        _, num_bytes_each = FLOATS.get(tensor.dtype, ("", None))
        if num_bytes_each and math.prod(tensor.shape) * num_bytes_each != tensor.end - tensor.start:
            raise _corrupt(f"{tensor.key[:200]!r} has another size than its shape needs")
    places = [(0, 0), *sorted((tensor.start, tensor.end) for tensor in tensors), (num_bytes, num_bytes)]
    if any(end != start for (_, end), (start, _) in pairwise(places)):
        raise _corrupt(f"its tensors do not fill the {num_bytes} bytes after its header")


def _corrupt(reason: str) -> AdapterError:
    return AdapterError(f"{WEIGHTS_FILE} is truncated or corrupt: {reason}")
