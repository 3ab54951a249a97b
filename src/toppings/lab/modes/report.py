"""What the step logs of several modes say: `logs/<mode>/steps.jsonl`, one JSON record per engine step."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from toppings.config import MODES

KINDS = ("prefill", "mixed", "decode")
NEVER_OVERLAPS = ("cached", "on_demand")
NEVER_ON_CPU = ("cached", "on_demand", "pipelined")


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """One record; `load_ms` is the part of `ms` that waited for adapter weights. None: not in the record."""

    kind: str
    ms: float
    load_ms: float
    overlapped_load_ms: float | None
    cpu_layers: float | None
    num_layers: float | None


@dataclass(frozen=True)
class ModeSteps:
    """Means over a mode's steps, in ms; None where there were no such steps or the log does not tell.

    Prefill and loads are means over the steps that computed prompts, whether decodes ran with them or not.
    `load_ms`: waited for, as part of the prefill; `overlapped_load_ms`: travelled while the step computed.
    `cpu_share`: of the layers of these steps' cold adapters, those computed on the CPU.
    """

    mode: str
    num_prefills: int
    num_decodes: int
    prefill_ms: float | None
    decode_ms: float | None
    load_ms: float | None
    overlapped_load_ms: float | None
    cpu_share: float | None


@dataclass(frozen=True)
class StepReport:
    """`link_gbps`: speeds of the emulated links in the runs' configurations; empty where there were none."""

    modes: list[ModeSteps]
    link_gbps: list[float]

    def to_json(self) -> dict[str, Any]:
        return {
            "emulated_link_gbps": self.link_gbps or None,
            "modes": {
                each.mode: {k: v for k, v in asdict(each).items() if k != "mode"} for each in self.modes
            },
        }


def is_prompt_step(step: LoggedStep) -> bool:
    return step.kind != "decode"


def read_report(logs: Path) -> StepReport:
    """Of each mode with a step log below `logs`. Raises ValueError if none is, or for a malformed line."""
    files = sorted(logs.glob("*/steps.jsonl"), key=lambda file: _place(file.parent.name))
    if not files:
        raise ValueError(f"no step log below {logs}; there must be at least one {logs}/<mode>/steps.jsonl")
    links = {gbps for file in files if (gbps := _link_gbps(file.parent / "config.yaml"))}
    return StepReport([summarize_steps(file.parent.name, read_steps(file)) for file in files], sorted(links))


def read_steps(file: Path) -> list[LoggedStep]:
    """Raises ValueError naming file and line where one is no record of a step."""
    steps = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            steps.append(_parse(line))
        except (ValueError, KeyError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file}:{number}: no record of a step: {reason}") from error
    return steps


def summarize_steps(mode: str, steps: Sequence[LoggedStep]) -> ModeSteps:
    prompts = [step for step in steps if is_prompt_step(step)]
    decodes = [step for step in steps if not is_prompt_step(step)]
    return ModeSteps(
        mode=mode,
        num_prefills=len(prompts),
        num_decodes=len(decodes),
        prefill_ms=_mean(step.ms for step in prompts),
        decode_ms=_mean(step.ms for step in decodes),
        load_ms=_mean(step.load_ms for step in prompts),
        overlapped_load_ms=_mean_overlap(mode, prompts),
        cpu_share=_cpu_share(mode, prompts),
    )


def _mean_overlap(mode: str, steps: Sequence[LoggedStep]) -> float | None:
    """A missing field is zero only in modes where nothing is computed while a load travels."""
    if mode in NEVER_OVERLAPS:
        return _mean(step.overlapped_load_ms or 0.0 for step in steps)
    known = [step.overlapped_load_ms for step in steps if step.overlapped_load_ms is not None]
    return _mean(known) if len(known) == len(steps) else None


def _cpu_share(mode: str, steps: Sequence[LoggedStep]) -> float | None:
    """A missing field is zero only in modes that leave no layer to the CPU."""
    known = [(step.cpu_layers, step.num_layers) for step in steps if step.cpu_layers is not None]
    num_layers = sum(total or 0.0 for _, total in known)
    if num_layers:
        return sum(cpu for cpu, _ in known) / num_layers
    return 0.0 if mode in NEVER_ON_CPU and steps else None


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def _parse(line: str) -> LoggedStep:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"{line[:40]!r} is no JSON object")
    if record["kind"] not in KINDS:
        raise ValueError(f"kind is {record['kind']!r}; it must be one of {', '.join(KINDS)}")
    optional = ("overlapped_load_ms", "cpu_layers", "num_layers")
    return LoggedStep(
        record["kind"],
        _number(record, "ms"),
        _number(record, "load_ms"),
        *(_number(record, name) if name in record else None for name in optional),
    )


def _number(record: dict[str, Any], name: str) -> float:
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a number of at least 0")
    return float(value)


def _place(mode: str) -> tuple[int, str]:
    """Known modes in their own order, others after them."""
    return (MODES.index(mode) if mode in MODES else len(MODES), mode)


def _link_gbps(config_file: Path) -> float:
    """Of the configuration that the server wrote beside its log; 0 where there is none."""
    try:
        settings = yaml.safe_load(config_file.read_text())
        return float(settings["link_gbps"])
    except FileNotFoundError:
        return 0.0
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config_file} is no configuration with link_gbps: {error!r}") from error
