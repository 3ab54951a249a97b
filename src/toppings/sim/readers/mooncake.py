"""Mooncake: one JSON object a line, timestamp (ms), input_length, output_length, hash_ids; adapters are
drawn.

`hash_ids` name the prompt's blocks of 512 tokens, each with all before it: what prompts have in common. A
trace without any has nothing.
"""

from pathlib import Path

import msgspec
import numpy as np

from toppings.sim.assign import TraceOptions, trace_of_lengths
from toppings.sim.blocks import PromptBlocks
from toppings.sim.readers.base import TraceFormat
from toppings.sim.trace import Trace, TraceError

BLOCK_LEN = 512


class _Row(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def _read(path: Path, options: TraceOptions) -> Trace:
    decoder = msgspec.json.Decoder(_Row)
    with path.open("rb") as file:
        rows = [_decode(path, line, text, decoder) for line, text in enumerate(file, 1) if text.strip()]
    if not rows:
        raise TraceError(f"{path}:1: the file has no rows")
    times_s = np.array([row.timestamp for row in rows]) / 1000
    prompt = np.array([row.input_length for row in rows])
    response = np.array([row.output_length for row in rows])
    blocks = PromptBlocks.of([row.hash_ids for row in rows], BLOCK_LEN)
    shared = blocks if len(blocks.ids) else None
    return trace_of_lengths(times_s, prompt, response, options, path.name, shared)


def _decode(path: Path, line: int, text: bytes, decoder: "msgspec.json.Decoder[_Row]") -> _Row:
    try:
        row = decoder.decode(text)
    except ValueError as error:
        raise TraceError(f"{path}:{line}: {error}") from error
    for name in ("timestamp", "input_length", "output_length"):
        if (value := getattr(row, name)) < 0:
            raise TraceError(f"{path}:{line}: {name} is {value}; it must be at least 0")
    return row


def _matches(head: str) -> bool:
    return head.startswith("{") and '"input_length"' in head


FORMAT = TraceFormat(_matches, _read)
