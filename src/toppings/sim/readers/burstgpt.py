"""BurstGPT: Timestamp (s), Model, Request tokens, Response tokens, …; adapters are drawn.

A row with 0 response tokens is a request that failed there: it is left out, and counted in
`Trace.num_dropped`.
"""

from pathlib import Path

from toppings.sim.assign import TraceOptions, trace_of_lengths
from toppings.sim.readers.base import TraceFormat, header_is, number, read_columns, whole
from toppings.sim.trace import Trace

COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


def _read(path: Path, options: TraceOptions) -> Trace:
    columns = read_columns(path, dict(zip(COLUMNS, (number, whole, whole))))
    times_s, prompt, response = (columns[name] for name in COLUMNS)
    return trace_of_lengths(times_s, prompt, response, options, path.name)


FORMAT = TraceFormat(header_is(*COLUMNS), _read)
