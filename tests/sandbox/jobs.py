"""Jobs of sandboxes that run until they are ended: what a test does meanwhile may take any time."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.waiting import until
from toppings.sandbox.process import CHILD_FILE


def num_ticks(pid: int) -> int:
    """Of a processor, that the process has used: a hundredth of a second each."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


async def end_jobs(tasks: "Sequence[asyncio.Task[Any]]") -> None:
    """Kills the processes of this one's sandboxes, each as often as a job is begun in it anew."""

    def are_over() -> bool:
        for child in psutil.Process().children():
            with suppress(psutil.Error):  # it may have ended
                if str(CHILD_FILE) in child.cmdline():
                    child.kill()
        return all(task.done() for task in tasks)

    await until(are_over)
