"""Work under way: a bar on standard error, and an orderly end where the process is asked to stop."""

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

T = TypeVar("T")


class Bar:
    """Of `total` things, or with a total of 1 of a share."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, what: str = "", num_done: float = 1) -> None:
        self._progress.update(self._task, description=what or None, advance=num_done)

    def reach(self, what: str, share: float) -> None:
        self._progress.update(self._task, description=what or None, completed=min(share, 1.0))


@contextmanager
def progress_bar(what: str = "", total: float = 1.0) -> Iterator[Bar]:
    """A bar that is gone when this ends."""
    count = () if total == 1.0 else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description:28}"), BarColumn(), *count, TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Bar(progress, progress.add_task(what, total=total))


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """To its end, or cancelled in order by SIGTERM as by Ctrl-C, so that no server is left behind."""

    async def until_stopped() -> T:
        task = asyncio.ensure_future(work)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    try:
        return asyncio.run(until_stopped())
    except asyncio.CancelledError:
        raise SystemExit(128 + signal.SIGTERM) from None
