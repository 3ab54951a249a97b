"""Trace files: the format is named, or recognized by its first line; one short file each, listed here
alone.
"""

from pathlib import Path

from toppings.sim.assign import TraceOptions
from toppings.sim.readers import (
    azure_functions_2019,
    azure_functions_2021,
    azure_llm,
    burstgpt,
    mooncake,
    own,
)
from toppings.sim.readers.base import TraceFormat
from toppings.sim.trace import Trace, TraceError

FORMATS: dict[str, TraceFormat] = {
    "toppings": own.FORMAT,
    "azure-functions-2019": azure_functions_2019.FORMAT,
    "azure-functions-2021": azure_functions_2021.FORMAT,
    "azure-llm": azure_llm.FORMAT,
    "burstgpt": burstgpt.FORMAT,
    "mooncake": mooncake.FORMAT,
}

HEAD_BYTES = 65536


def load_trace(path: Path, options: TraceOptions | None = None, *, format_name: str = "auto") -> Trace:
    """Read a trace file. Raises TraceError naming file and line, ValueError for an unknown format name."""
    options = options or TraceOptions()
    if format_name == "auto":
        return FORMATS[detect_format(path)].read(path, options)
    if format_name not in FORMATS:
        raise ValueError(f"unknown trace format {format_name!r}; choose one of auto, {', '.join(FORMATS)}")
    return FORMATS[format_name].read(path, options)


def detect_format(path: Path) -> str:
    """The format of the file's first line. Raises TraceError where it is none that we know."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        head = file.readline(HEAD_BYTES).strip()
    for name, trace_format in FORMATS.items():
        if trace_format.matches(head):
            return name
    raise TraceError(
        f"{path}:1: {head[:80]!r} begins no trace format that we know ({', '.join(FORMATS)}); "
        "our own CSV begins with arrival_s,adapter,rank,prompt_tokens,response_tokens"
    )
