"""What simulated servers are asked: a trace file, or a workload, and options that change what these say."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from toppings.lab.options import parse_ranks
from toppings.sim.assign import TraceOptions
from toppings.sim.readers import FORMATS, load_trace
from toppings.sim.synth.arrivals import ARRIVALS
from toppings.sim.synth.lengths import PARAMETERS as LENGTHS
from toppings.sim.synth.popularity import POPULARITIES
from toppings.sim.synth.workload import PRESETS, Workload, preset
from toppings.sim.trace import Trace


@dataclass(frozen=True, kw_only=True)
class _Changes:
    """Options that change what a trace or a workload says itself."""

    rate: Annotated[
        float | None, typer.Option(help="requests per second (default: the trace's or preset's own)")
    ] = None
    duration: Annotated[float | None, typer.Option(help="seconds (default: all; preset: its own)")] = None
    adapters: Annotated[int | None, typer.Option(help="how many adapters")] = None
    ranks: Annotated[str, typer.Option(help="ranks of the adapters, in turn")] = "8,16,32,64"
    popularity: Annotated[
        str | None, typer.Option(help=f"{', '.join(POPULARITIES)}; zipf:1.2, geometric:1.5")
    ] = None
    lengths: Annotated[str | None, typer.Option(help=f"{', '.join(LENGTHS)}; fixed:PROMPT:RESPONSE")] = None

    def changes(self, **more: Any) -> dict[str, Any]:
        """Fields of `TraceOptions` and `Workload` that were given."""
        given = {
            "rate": self.rate,
            "duration_s": self.duration,
            "num_adapters": self.adapters,
            "popularity": self.popularity,
            "lengths": self.lengths,
            **more,
        }
        kept = {name: value for name, value in given.items() if value is not None}
        return {**kept, "ranks": parse_ranks(self.ranks)}


@dataclass(frozen=True, kw_only=True)
class FromFile(_Changes):
    format_name: Annotated[str, typer.Option("--format", help=f"auto, {', '.join(FORMATS)}")] = "auto"
    start: Annotated[float, typer.Option(help="leave out the trace's first seconds")] = 0.0

    def load(self, path: Path, seed: int) -> Trace:
        options = TraceOptions(start_s=self.start, seed=seed, **self.changes())
        return load_trace(path, options, format_name=self.format_name)


@dataclass(frozen=True, kw_only=True)
class FromPreset(_Changes):
    arrivals: Annotated[str | None, typer.Option(help=f"{', '.join(ARRIVALS)}; gamma:CV")] = None
    drift: Annotated[float | None, typer.Option(help="seconds between changes of popularity")] = None
    turns: Annotated[float | None, typer.Option(help="of a conversation, on average (1: none)")] = None

    def workload(self, name: str) -> Workload:
        return replace(
            preset(name), **self.changes(arrivals=self.arrivals, drift_s=self.drift, turns=self.turns)
        )


@dataclass(frozen=True, kw_only=True)
class Source(FromFile, FromPreset):
    """One of the two."""

    trace: Annotated[Path | None, typer.Option(help="a trace file")] = None
    synth: Annotated[str | None, typer.Option(help=f"or a workload: {', '.join(PRESETS)}")] = None

    def sources(self, seeds: Sequence[int]) -> list[Trace | Workload]:
        """What each seed's simulation is asked. Raises ValueError where not one of both is given, or for
        options that would be ignored.
        """
        if (self.trace is None) == (self.synth is None):
            raise ValueError(f"give either --trace FILE or --synth WORKLOAD, one of {', '.join(PRESETS)}")
        if self.trace is not None:
            if self.arrivals or self.drift or self.turns:
                raise ValueError("--arrivals, --drift and --turns are of a workload; the trace has its own")
            return [self.load(self.trace, seed) for seed in seeds]
        assert self.synth is not None
        if self.start or self.format_name != "auto":
            raise ValueError("--start and --format are of a trace file")
        return [self.workload(self.synth)] * len(seeds)
