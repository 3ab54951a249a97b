"""Azure LLM inference 2023 and 2024: TIMESTAMP, ContextTokens, GeneratedTokens; adapters are drawn."""

from pathlib import Path

import numpy as np

from toppings.sim.assign import TraceOptions, trace_of_lengths
from toppings.sim.readers.base import TraceFormat, header_is, instant, read_columns, whole
from toppings.sim.trace import Trace


def _read(path: Path, options: TraceOptions) -> Trace:
    columns = read_columns(path, {"TIMESTAMP": instant, "ContextTokens": whole, "GeneratedTokens": whole})
    nanoseconds = columns["TIMESTAMP"]
    times_s = (nanoseconds - nanoseconds.min()).astype(np.float64) / 1e9
    return trace_of_lengths(times_s, columns["ContextTokens"], columns["GeneratedTokens"], options, path.name)


FORMAT = TraceFormat(header_is("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _read)
