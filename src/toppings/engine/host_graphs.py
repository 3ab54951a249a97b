"""Decode steps of few rows on the CPU, recorded and run again in one call each (`ops/cpu_recording.py`)."""

from collections.abc import Callable

import torch

from toppings.engine.graphs import Graph
from toppings.model.decoder import Decoder
from toppings.ops import dispatch

MAX_ROWS = 8
"""Steps of more rows have so much to compute that calling their kernels one by one counts for little."""


class HostGraphs:
    """`GraphBackend` for a model in host memory; its graphs share their buffers."""

    def __init__(self) -> None:
        from toppings.ops.cpu_recording import Memory  # needs numba

        self._memory = Memory()

    def capture(self, run: Callable[[], None]) -> Graph:
        from toppings.ops.cpu_recording import Recorder

        with torch.inference_mode(), Recorder(self._memory) as recorder:
            run()
        return recorder.recording()


def recorded_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Every number of rows: padding would have to be computed."""
    return tuple(range(1, min(MAX_ROWS, max_num_seqs) + 1))


def can_record(decoder: Decoder) -> bool:
    """The model's products of few rows are all kernels': where they are torch's, there is little to save. Who
    goes to which expert is asked for on the host, which no recording follows."""
    if decoder.config.has_experts:
        return False
    return dispatch.USE_NUMBA and decoder.device.type == "cpu" and decoder.has_kernels(MAX_ROWS)
