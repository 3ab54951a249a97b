"""How long the part of a GGUF file is that says what its weights mean: all before the weights themselves."""

import mmap
import os
import struct
from pathlib import Path

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 256 << 20
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type's number, as the format's specification has them."""
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def header_bytes(file: Path) -> int:
    """From the file's beginning to the end of its last tensor's description; of a file that is damaged, or
    whose header is larger than `MAX_HEADER_BYTES`, as far as it can be followed. Raises OSError."""
    with file.open("rb") as stream:
        size = min(os.fstat(stream.fileno()).st_size, MAX_HEADER_BYTES)
        if size == 0:
            return 0
        with mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) as content:
            walk = _Walk(content, size)
            try:
                walk.skip_header()
            except (_EndError, struct.error, KeyError, RecursionError):
                return size if walk.at > size else walk.at
            return walk.at


class _EndError(Exception):
    """The file ends within its header."""


class _Walk:
    """A place in the file that goes on past one thing after the other."""

    def __init__(self, content: mmap.mmap, size: int) -> None:
        self._content, self._size = content, size
        self.at = len(MAGIC) + _U32.size  # behind the version

    def skip_header(self) -> None:
        num_tensors, num_values = self._number(_U64), self._number(_U64)
        for _ in range(num_values):
            self._skip_strings(1)
            self._skip_values(self._number(_U32), 1)
        for _ in range(num_tensors):
            self._skip_strings(1)
            self._skip(self._number(_U32) * 8 + 4 + 8)  # its dimensions, type and place

    def _number(self, kind: struct.Struct) -> int:
        [number] = kind.unpack_from(self._content, self.at)
        self.at += kind.size
        return int(number)

    def _skip(self, num_bytes: int) -> None:
        self.at += num_bytes
        if self.at > self._size:
            raise _EndError

    def _skip_values(self, kind: int, count: int) -> None:
        if kind == _STRING:
            self._skip_strings(count)
        elif kind == _ARRAY:
            for _ in range(count):
                self._skip_values(self._number(_U32), self._number(_U64))
        else:
            self._skip(_SIZES[kind] * count)

    def _skip_strings(self, count: int) -> None:
        """A vocabulary has hundreds of thousands."""
        at, content, size, unpack = self.at, self._content, self._size, _U64.unpack_from
        for _ in range(count):
            at += 8 + unpack(content, at)[0]
            if at > size:
                self.at = at
                raise _EndError
        self.at = at
