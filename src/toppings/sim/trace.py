"""A trace: when requests arrive, for which adapter, and how long they are. Arrays, not objects."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toppings.sim.blocks import PromptBlocks

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]

COLUMNS = ("arrival_s", "adapter", "rank", "prompt_tokens", "response_tokens")
"""Header of our own CSV format."""
TENANT_COLUMNS = ("tenant", "weight")
"""Of traces whose requests are of tenants; without the second, all have the weight 1."""

MAX_REQUESTS = 200_000_000


class TraceError(ValueError):
    """A trace cannot be read; the message names the file, the line and what would be right."""


@dataclass(frozen=True, eq=False)
class Tenants:
    """Whose N requests are: `indices` [N] int32, of `names` [T], with a weight each.

    Raises ValueError for a weight that is not above 0.
    """

    indices: IntArray
    names: Sequence[str]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.weights)
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"weights of tenants are {list(self.weights)}; they must be above 0")


@dataclass(frozen=True, eq=False)
class Trace:
    """N requests for A adapters over `duration_s` seconds.

    `arrivals_s` [N] float64, ascending, 0 … `duration_s`; `adapters` [N] int32, index of the adapter;
    `prompt_tokens`, `response_tokens` [N] int32, at least 1; `ranks` [A] int32. `names` [A] is empty where
    adapters have no names of their own. `num_dropped` requests of the source are left out: they failed there.
    `blocks`: what prompts have in common, where the source tells of it; `tenants`: whose requests are.

    Raises ValueError where an array breaks this.
    """

    arrivals_s: FloatArray
    adapters: IntArray
    prompt_tokens: IntArray
    response_tokens: IntArray
    ranks: IntArray
    duration_s: float
    origin: str
    names: Sequence[str] = ()
    num_dropped: int = 0
    blocks: PromptBlocks | None = None
    tenants: Tenants | None = None

    def __post_init__(self) -> None:
        lengths = {len(a) for a in (self.arrivals_s, self.adapters, self.prompt_tokens, self.response_tokens)}
        assert len(lengths) == 1, f"columns of different lengths {lengths}"
        assert len(self.names) in (0, len(self.ranks))
        assert self.blocks is None or len(self.blocks) == len(self)
        assert self.tenants is None or len(self.tenants.indices) == len(self)
        if not self.duration_s > 0:
            raise ValueError(
                f"{self.origin}: the trace lasts {self.duration_s} s; it must last longer than 0 s"
            )
        if not len(self):
            return
        if (
            self.arrivals_s[0] < 0
            or self.arrivals_s[-1] > self.duration_s
            or (np.diff(self.arrivals_s) < 0).any()
        ):
            raise ValueError(f"{self.origin}: arrivals must ascend within 0 … {self.duration_s} s")
        for name in ("prompt_tokens", "response_tokens"):
            if (least := int(getattr(self, name).min())) < 1:
                raise ValueError(f"{self.origin}: {name} is {least}; it must be at least 1")
        if self.adapters.min() < 0 or self.adapters.max() >= len(self.ranks):
            raise ValueError(
                f"{self.origin}: adapter {int(self.adapters.max())} of {len(self.ranks)} adapters"
            )

    def __len__(self) -> int:
        return len(self.arrivals_s)

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self) / self.duration_s

    @cached_property
    def adapter_names(self) -> list[str]:
        return list(self.names) or [f"adapter-{i}" for i in range(len(self.ranks))]

    def scaled_to(self, rate: float) -> "Trace":
        """The same requests with time stretched or squeezed to `rate` per second: bursts keep their shape."""
        if not rate > 0:
            raise ValueError(f"rate is {rate}; it must be above 0")
        factor = self.rate / rate
        return replace(self, arrivals_s=self.arrivals_s * factor, duration_s=self.duration_s * factor)

    def between(self, start_s: float, stop_s: float) -> "Trace":
        """The requests of `start_s` <= arrival < `stop_s`, as a trace that begins at 0.

        Raises ValueError where the window lies outside the trace.
        """
        if not 0 <= start_s < self.duration_s or stop_s <= start_s:
            raise ValueError(f"window {start_s} … {stop_s} s is not within the trace's {self.duration_s} s")
        first, last = np.searchsorted(self.arrivals_s, [start_s, stop_s])
        columns, tenants = ("adapters", "prompt_tokens", "response_tokens"), self.tenants
        return replace(
            self,
            arrivals_s=self.arrivals_s[first:last] - start_s,
            **{name: getattr(self, name)[first:last] for name in columns},
            duration_s=min(stop_s, self.duration_s) - start_s,
            blocks=None if self.blocks is None else self.blocks.take(range(int(first), int(last))),
            tenants=None if tenants is None else replace(tenants, indices=tenants.indices[first:last]),
        )


def write_trace(trace: Trace, path: Path) -> None:
    """Write our own CSV; times keep nanoseconds. Only adapters that are asked for come back when it is
    read. A file named .jsonl gets Mooncake's format, which has `blocks` and no adapters.

    Raises ValueError where CSV would lose what prompts have in common.
    """
    if path.suffix == ".jsonl":
        _write_blocks(trace, path)
        return
    if trace.blocks is not None:
        raise ValueError(f"{path} would lose what prompts have in common; name the file *.jsonl")
    names, ranks, tenants = trace.adapter_names, trace.ranks.tolist(), trace.tenants
    columns = COLUMNS if tenants is None else COLUMNS + TENANT_COLUMNS
    owners = (
        [()] * len(trace)
        if tenants is None
        else [(tenants.names[i], tenants.weights[i]) for i in tenants.indices.tolist()]
    )
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for at, adapter, prompt, response, owner in zip(
            trace.arrivals_s.tolist(),
            trace.adapters.tolist(),
            trace.prompt_tokens.tolist(),
            trace.response_tokens.tolist(),
            owners,
        ):
            writer.writerow((f"{at:.9f}", names[adapter], ranks[adapter], prompt, response, *owner))


def _write_blocks(trace: Trace, path: Path) -> None:
    columns = (trace.arrivals_s, trace.prompt_tokens, trace.response_tokens)
    with path.open("w") as file:
        for row, (at, prompt, response) in enumerate(zip(*(column.tolist() for column in columns))):
            ids = [] if trace.blocks is None else trace.blocks[row]
            entry = {"timestamp": at * 1e3, "input_length": prompt, "output_length": response}
            file.write(json.dumps({**entry, "hash_ids": ids}) + "\n")
