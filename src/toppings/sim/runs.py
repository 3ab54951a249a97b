"""Many simulations, each in a process of its own."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from toppings.sim.records import SimResult
from toppings.sim.settings import SimConfig
from toppings.sim.simulator import Simulator
from toppings.sim.synth.workload import Workload
from toppings.sim.trace import Trace

COMPILED = ("toppings.cluster.scan", "toppings.cluster.placement.packing")
"""Takes a second to import: once for all processes."""


class SimulationError(RuntimeError):
    """A simulation's process failed; the message is its own."""


@dataclass(frozen=True)
class SimJob:
    """One simulation. A workload makes its trace from the configuration's seed, in the job's own process."""

    config: SimConfig
    source: Trace | Workload
    until_s: float = float("inf")

    def run(self, on_progress: Callable[[float], None] | None = None) -> SimResult:
        """`on_progress` is given the share that is done."""
        trace = self.source.make_trace(self.config.seed) if isinstance(self.source, Workload) else self.source

        def report(num_arrived: int) -> None:
            if on_progress is not None:
                on_progress(num_arrived / max(1, len(trace)))

        return Simulator(self.config, trace).run(until_s=self.until_s, on_progress=report)


def run_jobs(
    jobs: Sequence[SimJob],
    *,
    num_processes: int = 0,
    on_progress: Callable[[int, float], None] | None = None,
) -> list[SimResult]:
    """The results in the order of the jobs, which run `num_processes` at a time (0: one per core).

    `on_progress` is given a job's index and the share of it that is done. Raises ValueError where a job was
    wrong, SimulationError where its process failed; the others are then ended.
    """
    num_processes = num_processes or os.cpu_count() or 1
    if num_processes == 1 or len(jobs) == 1:
        return [job.run(_progress_of(i, on_progress)) for i, job in enumerate(jobs)]
    results: dict[int, SimResult] = {}
    with _Processes() as processes:
        waiting = iter(enumerate(jobs))
        for index, job in _take(waiting, num_processes):
            processes.start(index, job)
        while processes.connections:
            for index, kind, value in processes.receive():
                if kind == "progress" and on_progress is not None:
                    on_progress(index, value)
                elif kind == "result":
                    results[index] = value
                    for next_index, job in _take(waiting, 1):
                        processes.start(next_index, job)
    return [results[i] for i in range(len(jobs))]


def _take(waiting: "Iterator[tuple[int, SimJob]]", num: int) -> "list[tuple[int, SimJob]]":
    return [taken for _, taken in zip(range(num), waiting)]


def _progress_of(
    index: int, on_progress: Callable[[int, float], None] | None
) -> Callable[[float], None] | None:
    return None if on_progress is None else lambda share: on_progress(index, share)


class _Processes:
    """Jobs under way, with the pipe that each tells its progress through. Leaving ends them all."""

    def __init__(self) -> None:
        self.connections: dict[Connection, int] = {}
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
            process.join()

    def start(self, index: int, job: SimJob) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, *COMPILED])
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(job, theirs), daemon=True)
        process.start()
        theirs.close()
        self.connections[ours] = index
        self._processes.append(process)

    def receive(self) -> Iterator[tuple[int, str, Any]]:
        """What came: index, "progress" or "result", value. Raises as `run_jobs`."""
        for connection in wait(list(self.connections)):
            assert isinstance(connection, Connection)
            index = self.connections[connection]
            try:
                kind, value = connection.recv()
            except EOFError:
                raise SimulationError(f"simulation {index} died without a word") from None
            if kind == "error":
                raise value
            if kind == "result":
                del self.connections[connection]
                connection.close()
            yield index, kind, value


def _work(job: SimJob, connection: Connection) -> None:
    try:
        result = job.run(lambda share: connection.send(("progress", share)))
        connection.send(("result", result))
    except ValueError as error:
        connection.send(("error", ValueError(str(error))))
    except Exception as error:
        connection.send(("error", SimulationError(f"{type(error).__name__}: {error}")))
