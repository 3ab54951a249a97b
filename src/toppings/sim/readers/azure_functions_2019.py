"""Azure Functions 2019: HashOwner, HashApp, HashFunction, Trigger, then invocations in each minute of a day.

A day has about 10^9 invocations, so counts are thinned: with a rate, the invocations of a function in a
minute are Poisson with mean count x rate / recorded rate; without one, counts are taken as they are. Within
its minute an invocation arrives at a uniform instant. Functions become adapters, lengths are drawn.
"""

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toppings.sim.assign import TraceOptions, check_size, trace_of_functions
from toppings.sim.readers.base import TraceFormat, header_is
from toppings.sim.seeds import generator
from toppings.sim.trace import FloatArray, IntArray, Trace, TraceError

NAMES = ("HashOwner", "HashApp", "HashFunction", "Trigger")
MINUTE_S = 60.0
MAX_COUNT = 2**31 - 1

Counts = NDArray[np.int32]


def read_counts(path: Path) -> Counts:
    """Invocations [F, minutes]; a row is a function. Raises TraceError."""
    rows: list[Counts] = []
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        num_minutes = len(file.readline().split(",")) - len(NAMES)
        if num_minutes < 1:
            raise TraceError(f"{path}:1: the header names no minute after {','.join(NAMES)}")
        for line, text in enumerate(file, 2):
            if text.strip():
                rows.append(_counts(path, line, text, num_minutes))
    if not rows:
        raise TraceError(f"{path}:2: the file has no rows below its header")
    return np.stack(rows)


def _counts(path: Path, line: int, text: str, num_minutes: int) -> Counts:
    fields = text.rstrip().split(",", len(NAMES))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error", DeprecationWarning
            )  # how older NumPy says that a text is no number
            counts = np.fromstring(fields[-1], dtype=np.int64, sep=",")
    except (ValueError, DeprecationWarning):
        raise TraceError(f"{path}:{line}: a count is no whole number") from None
    if len(fields) <= len(NAMES) or len(counts) != num_minutes:
        raise TraceError(
            f"{path}:{line}: the row has {len(counts)} counts; the header has {num_minutes} minutes"
        )
    if counts.min() < 0 or counts.max() > MAX_COUNT:
        raise TraceError(
            f"{path}:{line}: counts are {counts.min()} … {counts.max()}; within 0 … {MAX_COUNT} is right"
        )
    return counts.astype(np.int32)


def _read(path: Path, options: TraceOptions) -> Trace:
    counts = read_counts(path)
    first, last = _window(counts.shape[1], options)
    counts, duration_s = counts[:, first:last], (last - first) * MINUTE_S
    num_recorded = float(counts.sum(dtype=np.int64))
    if not num_recorded:
        raise ValueError(f"{path.name}: no function is invoked in the window")
    factor = options.rate * duration_s / num_recorded if options.rate else 0.0
    check_size(num_recorded * (factor or 1.0), path.name)
    arrivals_s, functions = _spread(counts, factor, options.seed)
    return trace_of_functions(arrivals_s, functions, len(counts), duration_s, options, path.name)


def _window(num_minutes: int, options: TraceOptions) -> tuple[int, int]:
    """Whole minutes that hold the window. Raises ValueError where it begins after the trace's end."""
    first = int(options.start_s // MINUTE_S)
    if first >= num_minutes:
        raise ValueError(f"start_s is {options.start_s}; the trace ends at {num_minutes * MINUTE_S} s")
    stop_s = options.start_s + options.duration_s if options.duration_s else num_minutes * MINUTE_S
    return first, min(num_minutes, int(np.ceil(stop_s / MINUTE_S)))


def _spread(counts: Counts, factor: float, seed: int) -> tuple[FloatArray, IntArray]:
    """Instants and functions of the invocations, ascending, minute by minute."""
    rng = generator(seed, "invocations")
    instants, functions = [], []
    for minute, column in enumerate(np.ascontiguousarray(counts.T)):
        active = np.flatnonzero(column)
        num = rng.poisson(column[active] * factor) if factor else column[active]
        invoked = np.repeat(active.astype(np.int32), num)
        at = rng.random(len(invoked))
        order = np.argsort(at)
        instants.append((minute + at[order]) * MINUTE_S)
        functions.append(invoked[order])
    return np.concatenate(instants), np.concatenate(functions)


FORMAT = TraceFormat(header_is(*NAMES), _read)
