"""A process beside this one, over a pipe: it says that it is there, and answers what it is asked."""

import asyncio
import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

END_TIMEOUT_S = 10.0


class Child:
    """`told`: the first that it said."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.told = self._receive()

    def ask(self, question: Any) -> Any:
        """Raises RuntimeError where it ends without an answer."""
        self._pipe.send(question)
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("a process ended early; its error stands above") from None


@contextmanager
def child(serve: Callable[..., Any], *arguments: Any, cores: Set[int] | None = None) -> Iterator[Child]:
    """Runs `serve(pipe, *arguments)`, async or not, on these cores; at the end its last question is None.
    Raises RuntimeError where the process ends before it said anything."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(cores, serve, theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Child(ours)
    finally:
        with suppress(OSError):
            ours.send(None)
        process.join(END_TIMEOUT_S)
        process.kill()


def _run(cores: Set[int] | None, serve: Callable[..., Any], *arguments: Any) -> None:
    if cores is not None:
        os.sched_setaffinity(0, cores)
    result = serve(*arguments)
    if inspect.iscoroutine(result):
        asyncio.run(result)
