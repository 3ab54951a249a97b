"""The faults of a soak, each survived in its own way: what is done, and what is asked of the server then."""

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import psutil

from hostile.faults import (
    SmallDisk,
    kill,
    locked_registry,
    served_again,
    stopped,
    wait_for,
)
from hostile.served import ENGINE, START_TIMEOUT_S, WORKER, Program, Served

MODEL, OTHERS = "pirate", ("cook", "haiku")
ENGINE_START_S = 80.0
STEADY_S = 30.0
"""An engine is left alone for so long: one that has served for 20 s begins the count of restarts anew."""
HELD_S = 3.0
"""How long a process stays stopped, a disk full, a lock held, half a request lies there."""
HALF_A_REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{"
NUM_HALF_OPEN = 100


@dataclass(frozen=True)
class Fault:
    """`cause` returns the seconds until requests were served again; None where there was nothing to break.

    It raises TimeoutError where they never were. `is_outage`: nobody is there to take requests meanwhile.
    """

    name: str
    cause: Callable[[], float | None]
    is_outage: bool = False


def lasting_faults(served: Served, disks: dict[str, SmallDisk], patience_s: float) -> list[Fault]:
    """Those that leave server and engine in place; `patience_s`: until requests must be served again."""
    causes = {
        "worker killed": worker_killed,
        "worker stopped": worker_stopped,
        "server stopped": server_stopped,
    }
    causes |= {"registry locked": registry_locked, "requests that never end": half_open}
    return [
        *(Fault(name, partial(cause, served, timeout_s=patience_s)) for name, cause in causes.items()),
        *(
            Fault(f"disk of {name} full", partial(disk_full, served, disk=disk, timeout_s=patience_s))
            for name, disk in disks.items()
        ),
    ]


def engine_faults(served: Served, patience_s: float) -> list[Fault]:
    """A new engine may take `ENGINE_START_S` more."""
    causes = {"engine stopped": engine_stopped, "engine killed": engine_killed}
    timeout_s = patience_s + ENGINE_START_S
    return [Fault(name, partial(cause, served, timeout_s=timeout_s)) for name, cause in causes.items()]


def server_fault(served: Served, patience_s: float) -> Fault:
    return Fault("server killed", partial(server_killed, served, timeout_s=patience_s), is_outage=True)


def engine_killed(served: Served, *, timeout_s: float) -> float:
    engine = _steady_engine(served)
    kill(engine)
    return _served_by_another(served, engine, timeout_s)


def engine_stopped(served: Served, *, timeout_s: float) -> float:
    """It hangs, and is told so by nobody."""
    engine = _steady_engine(served)
    with stopped(engine):
        return _served_by_another(served, engine, timeout_s)


def _steady_engine(served: Served) -> psutil.Process:
    """Once it has served long enough that its end is not one of many in a row."""

    def is_steady() -> bool:
        engine = served.find(ENGINE)
        return engine is not None and time.time() - engine.create_time() > STEADY_S

    wait_for(is_steady, 2 * STEADY_S, "an engine serves for a while")
    engine = served.find(ENGINE)
    assert engine is not None
    return engine


def _served_by_another(served: Served, engine: psutil.Process, timeout_s: float) -> float:
    seconds = wait_for(lambda: _has_ended(engine), timeout_s, "the engine is ended")
    seconds += served_again(served, MODEL, timeout_s)
    wait_for(lambda: served.find(ENGINE) not in (None, engine), timeout_s, "an engine is started anew")
    return seconds


def _has_ended(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def worker_killed(served: Served, *, timeout_s: float) -> float | None:
    if (worker := served.find(WORKER)) is None:
        return None
    kill(worker)
    seconds = served_again(served, MODEL, timeout_s)
    wait_for(lambda: served.find(WORKER) not in (None, worker), timeout_s, "a worker is started anew")
    return seconds


def worker_stopped(served: Served, *, timeout_s: float) -> float | None:
    """Nothing waits for it; it is replaced where it was asked for something meanwhile."""
    if (worker := served.find(WORKER)) is None:
        return None
    with stopped(worker):
        seconds = max(served_again(served, model, timeout_s) for model in (*OTHERS, MODEL, ""))
        time.sleep(HELD_S)
    wait_for(lambda: served.find(WORKER) is not None, timeout_s, "there is a worker")
    return seconds


def server_stopped(served: Program, *, timeout_s: float) -> float:
    """Its first process, which takes the requests: all wait, and none is lost."""
    with stopped(psutil.Process(served.process.pid)):
        time.sleep(HELD_S)
    return served_again(served, MODEL, timeout_s)


def server_killed(served: Served, *, timeout_s: float) -> float:
    """It is started anew, as its supervisor would do it; what it had started has ended with it."""
    others = served.kill()
    wait_for(lambda: all(_has_ended(each) for each in others), timeout_s, "its other processes end")
    served.start()
    return served.wait_until_ready(START_TIMEOUT_S) + served_again(served, MODEL, timeout_s)


def registry_locked(served: Served, *, timeout_s: float) -> float:
    """Nobody can be registered, and everybody is served."""
    with locked_registry(served.state_dir):
        seconds = max(served_again(served, model, timeout_s) for model in (MODEL, ""))
        time.sleep(HELD_S)
    return seconds


def disk_full(served: Served, *, disk: SmallDisk, timeout_s: float) -> float:
    disk.fill()
    try:
        seconds = max(served_again(served, model, timeout_s) for model in (MODEL, *OTHERS, ""))
        time.sleep(HELD_S)
    finally:
        disk.free()
    return seconds


def half_open(served: Program, *, timeout_s: float) -> float:
    with ExitStack() as stack:
        for _ in range(NUM_HALF_OPEN):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 10))
            connection.sendall(HALF_A_REQUEST)
        time.sleep(HELD_S)
        return served_again(served, MODEL, timeout_s)
