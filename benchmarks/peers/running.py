"""Sides as processes: started, asked, and ended; one that fails is told and the others go on."""

import json
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from peers.isa import environment

FOLDER = Path(__file__).parents[1]
START_TIMEOUT_S, ANSWER_TIMEOUT_S, END_TIMEOUT_S = 600.0, 300.0, 20.0


class SideFailed(RuntimeError):
    """A side does not start, or does not answer."""


class RunningSide:
    """`told`: what it said of itself."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process, self._log = process, log
        self.told = self._read(START_TIMEOUT_S)

    def ask(self, **question: Any) -> dict[str, Any]:
        """Raises SideFailed."""
        with suppress(BrokenPipeError):  # it has ended; its log says why
            _pipe(self._process.stdin).write(json.dumps(question) + "\n")
            _pipe(self._process.stdin).flush()
        return self._read(ANSWER_TIMEOUT_S)

    def _read(self, timeout_s: float) -> dict[str, Any]:
        out = _pipe(self._process.stdout)
        if not select.select([out], [], [], timeout_s)[0]:
            raise SideFailed(f"it said nothing for {timeout_s:g} s")
        if not (line := out.readline()):
            lines = self._log.read_text(errors="replace").splitlines()
            raise SideFailed(
                next((line for line in reversed(lines) if line.strip()), "it ended without a word")
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideFailed(answer["error"])
        return answer


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@contextmanager
def running(
    module: str, *, python: str, isa: str, job: Mapping[str, Any], log: Path
) -> Iterator[RunningSide]:
    """`peers.<module>` in this Python, told its job. Raises SideFailed."""
    variables = environment(isa)
    paths = [str(FOLDER), *filter(None, [variables.get("PYTHONPATH")] if python == sys.executable else [])]
    command = [python, "-m", f"peers.{module}", json.dumps(job)]
    with ExitStack() as stack:
        errors = stack.enter_context(log.open("w"))
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**variables, "PYTHONPATH": ":".join(paths)},
            )
        except OSError as error:
            raise SideFailed(f"cannot run {python}: {error.strerror}") from error
        stack.callback(_end, process)
        yield RunningSide(process, log)


def _end(process: "subprocess.Popen[str]") -> None:
    with suppress(OSError):
        _pipe(process.stdin).close()
    try:
        process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _pipe(process.stdout).close()
