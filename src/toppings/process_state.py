"""What the kernel says of another process."""

import os
import signal
from contextlib import suppress
from pathlib import Path


def is_stopped(pid: int) -> bool:
    """By a signal or a debugger: it does not run until it is told to, however idle the machine. False, too,
    where the kernel does not say."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt"
    return False


def go_on(pid: int) -> None:
    """One that a signal has stopped runs again; others take no note."""
    with suppress(OSError):
        os.kill(pid, signal.SIGCONT)
