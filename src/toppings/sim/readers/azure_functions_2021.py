"""Azure Functions 2021: app, func, end_timestamp (s), duration (s); an invocation arrives at end - duration.

A function is one of an app: app and func together name it. Functions become adapters, lengths are drawn.
"""

from pathlib import Path

import numpy as np

from toppings.sim.assign import TraceOptions, trace_of_functions, windowed
from toppings.sim.readers.base import Codes, TraceFormat, header_is, number, read_columns
from toppings.sim.trace import Trace

COLUMNS = ("app", "func", "end_timestamp", "duration")


def _read(path: Path, options: TraceOptions) -> Trace:
    columns = read_columns(path, dict(zip(COLUMNS, (Codes(), Codes(), number, number))))
    pairs = np.stack([columns["app"], columns["func"]])
    distinct, functions = np.unique(pairs, axis=1, return_inverse=True)
    starts_s = columns["end_timestamp"] - columns["duration"]
    order = np.argsort(starts_s, kind="stable")
    arrivals_s = starts_s[order] - starts_s[order[0]]
    trace = trace_of_functions(
        arrivals_s,
        functions.reshape(-1)[order].astype(np.int32),
        distinct.shape[1],
        max(float(arrivals_s[-1]), 1e-9),
        options,
        path.name,
    )
    return windowed(trace, options)


FORMAT = TraceFormat(header_is(*COLUMNS), _read)
