"""What a plain LoRA and the base model pay for all else that an engine can do, against an earlier commit.

    python benchmarks/plain_cost.py                      # against the one before there were other kinds
    python benchmarks/plain_cost.py --against COMMIT
    python benchmarks/plain_cost.py --toy                # this tree against itself

Two processes, one on this working tree and one on a `git worktree` of the commit, which is removed at the
end, have the same checkpoint and the same requests; one works at a time, in rounds that alternate. Loads:
decode steps of eight requests, prompts of 128 tokens; of the base model and of a plain LoRA. `cost`: what
this tree takes over what the commit takes, minus 1, of the least of all rounds' processor times; of
`instructions` in user mode, which other work on the machine does not change, their median, where the kernel
counts them (null elsewhere). `rounds`: quartiles of the rounds' own ratios of times. Ends in one JSON line.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toppings.lab.script import finish, make_parser, parse
from toppings.synth import PRESETS, AdapterShape, ModelShape, write_adapters, write_model

ROOT = Path(__file__).parents[1]
SIDE = Path(__file__).parent / "plain" / "side.py"
BEFORE_OTHER_KINDS = "1d029e3"
"""The last commit that served plain LoRAs alone."""


@dataclass(frozen=True)
class Load:
    num_requests: int
    num_prompt: int
    num_tokens: int
    has_adapter: bool


@dataclass(frozen=True)
class Scale:
    shape: ModelShape
    num_rounds: int
    num_steps: int


FULL = Scale(ModelShape(hidden=512, layers=8, intermediate=1408, vocab=8000), 15, 64)
TOY = Scale(PRESETS["tiny"], 2, 4)


class Process:
    """One side, waiting for a load."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self._receive()

    def run(self, load: Load) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(load)) + "\n")
        self._process.stdin.flush()
        result: dict[str, Any] = json.loads(self._receive())
        return result

    def _receive(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError("a side ended early; its error stands above")
        return line


@contextmanager
def side(tree: Path, model: Path, adapter: Path, state_dir: Path) -> Iterator[Process]:
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    command = [sys.executable, str(SIDE), str(model), str(adapter), str(state_dir)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Process(process)
        finally:
            process.kill()


@contextmanager
def tree_of(commit: str, place: Path) -> Iterator[Path]:
    """Raises CalledProcessError for a commit that git does not have."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
    try:
        yield place
    finally:
        subprocess.run([*git, "remove", "--force", str(place)], check=True)


def compare(now: Process, before: Process, load: Load, num_rounds: int) -> dict[str, Any]:
    taken: dict[str, list[dict[str, Any]]] = {"now": [], "before": []}
    sides = [("now", now), ("before", before)]
    for number in range(num_rounds + 1):
        for name, process in sides if number % 2 else sides[::-1]:
            result = process.run(load)
            if number:  # the first one warms up
                taken[name].append(result)
    seconds = {name: [each["cpu_s"] for each in results] for name, results in taken.items()}
    ratios = [a / b for a, b in zip(seconds["now"], seconds["before"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    counted = {name: [each["instructions"] for each in results] for name, results in taken.items()}
    has_counts = all(value is not None for values in counted.values() for value in values)
    medians = {name: statistics.median(values) for name, values in counted.items()} if has_counts else None
    return {
        "cost": min(seconds["now"]) / min(seconds["before"]) - 1,
        "instructions": None if medians is None else medians["now"] / medians["before"] - 1,
        "rounds": [round(each - 1, 5) for each in quartiles],
        "now_ms": 1e3 * min(seconds["now"]),
        "before_ms": 1e3 * min(seconds["before"]),
    }


def loads(scale: Scale) -> dict[str, Load]:
    found = {}
    for name, has_adapter in (("base", False), ("plain LoRA", True)):
        found[f"{name}, decode"] = Load(8, 16, scale.num_steps, has_adapter)
        found[f"{name}, prefill"] = Load(4, 128, 1, has_adapter)
    return found


def main() -> None:
    parser = make_parser(__doc__, "a tiny model, this tree against itself")
    parser.add_argument("--against", default=BEFORE_OTHER_KINDS, help="a commit (default: %(default)s)")
    options = parse(parser)
    scale = TOY if options.toy else FULL
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        place = Path(directory)
        write_model(place / "model", scale.shape)
        write_adapters(place / "adapters", place / "model", AdapterShape(ranks=(16,)), count=1)
        adapter = next((place / "adapters").iterdir())
        tree = ROOT if options.toy else stack.enter_context(tree_of(options.against, place / "before"))
        now, before = (
            stack.enter_context(side(each, place / "model", adapter, place / name))
            for name, each in (("state-now", ROOT), ("state-before", tree))
        )
        results = {name: compare(now, before, load, scale.num_rounds) for name, load in loads(scale).items()}
    finish(options, "plain_cost", against="itself" if options.toy else options.against, loads=results)


if __name__ == "__main__":
    main()
