"""What goes wrong around a server: processes killed or stopped, disks full, the registry locked."""

import ctypes
import os
import signal
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil

from hostile.served import Program

_MNT_DETACH = 2


def kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)


@contextmanager
def stopped(*processes: psutil.Process) -> Iterator[None]:
    """They hang, as one does that waits for a device for ever."""
    _signal_all(processes, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal_all(processes, signal.SIGCONT)


def _signal_all(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@contextmanager
def locked_registry(state_dir: Path) -> Iterator[None]:
    """Another process, which is this one, writes to the registry and does not come to an end."""
    [file] = state_dir.rglob("*.sqlite")
    with closing(sqlite3.connect(file, timeout=30, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            connection.execute("ROLLBACK")


class SmallDisk:
    """A file system of its own, of a few megabytes. Raises PermissionError where mounting is forbidden."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        path.mkdir(parents=True)
        libc = ctypes.CDLL(None, use_errno=True)
        self._umount = libc.umount2
        arguments = (b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={num_bytes}".encode())
        if libc.mount(*arguments) != 0:
            raise PermissionError(ctypes.get_errno(), "cannot mount a small disk")
        self._filler = path / "filler"

    def fill(self) -> None:
        with open(self._filler, "ab", buffering=0) as filler, suppress(OSError):
            while filler.write(b"\0" * 4096):
                pass

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        self._umount(os.fsencode(self.path), _MNT_DETACH)


def wait_for(is_so: object, timeout_s: float, what: str) -> float:
    """Seconds until `is_so()`. Raises TimeoutError."""
    assert callable(is_so)
    started_at = time.perf_counter()
    while not is_so():
        if time.perf_counter() - started_at > timeout_s:
            raise TimeoutError(f"{what}: not within {timeout_s} s")
        time.sleep(0.02)
    return time.perf_counter() - started_at


def served_again(served: Program, model: str, timeout_s: float) -> float:
    """Seconds until a request for `model` is answered."""

    def is_answered() -> bool:
        with suppress(OSError):
            return served.complete(model)[0] == 200
        return False

    return wait_for(is_answered, timeout_s, f"a request for {model} is answered")
