"""What a trace format is, and columns of a CSV file as arrays."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toppings.sim.assign import TraceOptions
from toppings.sim.trace import Trace, TraceError

Array = NDArray[Any]
Converter = Callable[[Sequence[str]], Array]
"""Texts of a column to an array; raises ValueError, saying what would be right, where one is not."""

CHUNK_ROWS = 1 << 16
INSTANT = "a time in UTC such as 2023-11-16 18:17:03.97"


@dataclass(frozen=True)
class TraceFormat:
    """`matches` looks at a file's first line; `read` raises TraceError."""

    matches: Callable[[str], bool]
    read: Callable[[Path, TraceOptions], Trace]


def header_is(*names: str) -> Callable[[str], bool]:
    """Whether a first line has all these columns."""
    return lambda head: set(names) <= {name.strip() for name in head.split(",")}


def whole(texts: Sequence[str]) -> Array:
    """Counts: int64, at least 0."""
    return _checked(texts, np.int64, "a whole number, at least 0")


def number(texts: Sequence[str]) -> Array:
    """float64, finite, at least 0."""
    return _checked(texts, np.float64, "a number, at least 0")


def _checked(texts: Sequence[str], dtype: type, wanted: str) -> Array:
    try:
        values: Array = np.array(texts).astype(dtype)
    except ValueError as error:
        raise ValueError(wanted) from error
    if len(values) and not (np.isfinite(values).all() and values.min() >= 0):
        raise ValueError(wanted)
    return values


def instant(texts: Sequence[str]) -> Array:
    """UTC times such as `2023-11-16 18:17:03.9799600` or with +00:00 behind, to ns since 1970."""
    plain = [text.removesuffix("+00:00").removesuffix("Z") for text in texts]
    if any("+" in text or text.count("-") != 2 for text in plain):
        raise ValueError(INSTANT)
    try:
        values = np.array(plain, dtype="datetime64[ns]")
    except ValueError as error:
        raise ValueError(INSTANT) from error
    if np.isnat(values).any():
        raise ValueError(INSTANT)
    return values.astype(np.int64)


@dataclass
class Codes:
    """Numbers texts in the order in which they first appear."""

    numbers: dict[str, int] = field(default_factory=dict)

    def __call__(self, texts: Sequence[str]) -> Array:
        if not all(texts):
            raise ValueError("a name")
        numbers = self.numbers
        return np.array([numbers.setdefault(text, len(numbers)) for text in texts], dtype=np.int32)


def read_columns(path: Path, converters: Mapping[str, Converter]) -> dict[str, Array]:
    """The named columns of a CSV file with a header, each [N]; other columns are left alone.

    Raises TraceError where there are no rows, a column is missing, or a row is bad.
    """
    chunks = list(_chunks(path, converters))
    if not chunks:
        raise TraceError(f"{path}:2: the file has no rows below its header")
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in converters}


def _chunks(path: Path, converters: Mapping[str, Converter]) -> Iterator[dict[str, Array]]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        header = [name.strip() for name in next(reader, [])]
        for name in converters:
            if name not in header:
                raise TraceError(
                    f"{path}:1: the header has no column {name!r}, but {', '.join(header)[:200]}"
                )
        places = {name: header.index(name) for name in converters}
        line = 2
        while rows := list(islice(reader, CHUNK_ROWS)):
            yield _convert(path, rows, line, len(header), places, converters)
            line += len(rows)


def _convert(
    path: Path,
    rows: list[list[str]],
    first_line: int,
    width: int,
    places: Mapping[str, int],
    converters: Mapping[str, Converter],
) -> dict[str, Array]:
    for line, row in enumerate(rows, first_line):
        if len(row) != width:
            raise TraceError(f"{path}:{line}: the row has {len(row)} fields; the header has {width}")
    columns = list(zip(*rows))
    converted = {}
    for name, convert in converters.items():
        texts = columns[places[name]]
        try:
            converted[name] = convert(texts)
        except (ValueError, OverflowError):
            raise _first_error(path, texts, first_line, name, convert) from None
    return converted


def _first_error(
    path: Path, texts: Sequence[str], first_line: int, name: str, convert: Converter
) -> TraceError:
    for line, text in enumerate(texts, first_line):
        try:
            convert([text])
        except (ValueError, OverflowError) as error:
            return TraceError(f"{path}:{line}: {name} is {text!r}; it must be {error}")
    raise AssertionError("a column was refused, but none of its values")
