"""The faults of a soak, each survived in its own way: what is done, and what is asked of the server then."""

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import psutil

from hostile.faults import (
    ENGINE,
    WORKER,
    SmallDisk,
    kill,
    locked_registry,
    served_again,
    stopped,
    wait_for,
)
from hostile.served import Served

MODEL = "pirate"
ENGINE_START_S = 80.0
HELD_S = 3.0
"""How long a disk stays full, a lock is held, half a request is left lying."""
HALF_A_REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{"
NUM_HALF_OPEN = 100


@dataclass(frozen=True)
class Fault:
    """`cause` returns the seconds until requests were served again; None where there was nothing to break.

    It raises TimeoutError where they never were.
    """

    name: str
    cause: Callable[[Served], float | None]


def planned_faults(disks: dict[str, SmallDisk], patience_s: float) -> list[Fault]:
    """`patience_s`: until requests must be served again; a new engine may take `ENGINE_START_S` more."""
    engine_s = patience_s + ENGINE_START_S
    return [
        Fault("worker killed", partial(_replaced, part=WORKER, timeout_s=patience_s)),
        Fault("worker stopped", partial(_hung, part=WORKER, timeout_s=patience_s)),
        Fault("registry locked", partial(registry_locked, timeout_s=patience_s)),
        Fault("requests that never end", partial(half_open, timeout_s=patience_s)),
        *(
            Fault(f"disk of {name} full", partial(disk_full, disk=disk, timeout_s=patience_s))
            for name, disk in disks.items()
        ),
        Fault("engine stopped", partial(_hung, part=ENGINE, timeout_s=engine_s)),
        Fault("engine killed", partial(_replaced, part=ENGINE, timeout_s=engine_s)),
    ]


def _replaced(served: Served, *, part: str, timeout_s: float) -> float | None:
    """A process is killed; another one takes its place, and requests are served."""
    if (process := served.find(part)) is None:
        return None
    kill(process)
    return _served_by_another(served, process, part, timeout_s)


def _hung(served: Served, *, part: str, timeout_s: float) -> float | None:
    """A process hangs, and is told so by nobody."""
    if (process := served.find(part)) is None:
        return None
    with stopped(process):
        return _served_by_another(served, process, part, timeout_s)


def _served_by_another(served: Served, process: psutil.Process, part: str, timeout_s: float) -> float:
    seconds = wait_for(lambda: not process.is_running() or _is_dead(process), timeout_s, f"{part} is ended")
    seconds += served_again(served, MODEL, timeout_s)
    wait_for(lambda: served.find(part) not in (None, process), timeout_s, f"{part} is started anew")
    return seconds


def _is_dead(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


def registry_locked(served: Served, *, timeout_s: float) -> float:
    """Nobody can be registered, and everybody is served."""
    with locked_registry(served.state_dir):
        seconds = max(served_again(served, model, timeout_s) for model in (MODEL, ""))
        time.sleep(HELD_S)
    return seconds


def disk_full(served: Served, *, disk: SmallDisk, timeout_s: float) -> float:
    disk.fill()
    try:
        seconds = max(served_again(served, model, timeout_s) for model in (MODEL, "cook", "haiku", ""))
        time.sleep(HELD_S)
    finally:
        disk.free()
    return seconds


def half_open(served: Served, *, timeout_s: float) -> float:
    with ExitStack() as stack:
        for _ in range(NUM_HALF_OPEN):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 10))
            connection.sendall(HALF_A_REQUEST)
        time.sleep(HELD_S)
        return served_again(served, MODEL, timeout_s)
