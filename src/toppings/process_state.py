"""What the kernel says of another process, and does to this one when another ends."""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1


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


def die_with_parent(parent_pid: int) -> None:
    """The kernel kills this process when the thread that started it ends, even while it is stopped."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before the call
        sys.exit(0)
