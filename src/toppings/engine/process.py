"""The engine as a process of its own (spawn.py starts it).

A plain subprocess rather than `multiprocessing`: whoever starts it need not guard its main module. The model
must run on that process's main thread: GNU OpenMP puts its threads to sleep after every operator as soon as
they and the process's other threads outnumber the cores, which costs a third of a decode step.

Where the engine may have to be replaced, this process does not become the engine: it imports what an engine
needs, forks one, and stays, with one thread and nothing of a device, to fork the next. That takes a tenth of
the time that imports take, and the memory is shared.
"""

import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from toppings.config import EngineConfig
from toppings.engine.heartbeat import Heartbeat
from toppings.engine.transport import EngineEnd
from toppings.log_files import LOG_FORMAT, log_handlers
from toppings.messages import Begin, EngineFailed, Shutdown
from toppings.vital import EngineLostError

BEGIN_POLL_S = 0.5
STAYS = "--stays"
"""Argument of a process that forks its engines."""
MAX_START_BYTES = 1 << 16

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLog:
    """Where the process logs: standard error, and `file` (appended to) where one is named."""

    level: str = "warning"
    file: str = ""


@dataclass(frozen=True)
class Start:
    config: EngineConfig
    address: str
    log: EngineLog = field(default_factory=EngineLog)


@dataclass(frozen=True)
class Ended:
    """A forked engine has ended; `status` as `os.waitpid` gives it."""

    pid: int
    status: int


def main() -> None:
    # Ctrl-C reaches the whole process group, a service manager's SIGTERM all of its service's processes; the
    # client decides when the engine stops.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    control, stays = socket.socket(fileno=int(sys.argv[1])), STAYS in sys.argv
    if stays:
        signal.signal(signal.SIGCHLD, lambda *_: _report_ends(control))
        _import_all()
    while (received := _receive(control)) is not None:
        start, lifeline = received
        if stays:
            if os.fork():
                lifeline.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _name_process("toppings-engine")
        control.close()
        run(start, lifeline)
        return


def run(start: Start, lifeline: socket.socket) -> None:
    """An engine from its start to its end. Exits with 1 where it fails."""
    heart = Heartbeat(lifeline)
    _start_logging(start)
    end = EngineEnd(start.address)
    try:
        from toppings.engine.build import build_engine
        from toppings.engine.loop import EngineLoop

        engine = build_engine(
            start.config, await_registry=lambda: _await_begin(end, lambda: heart.is_orphaned)
        )
    except Exception as error:
        logger.debug("the engine could not start", exc_info=True)
        is_told = isinstance(error, ValueError | OSError | EngineLostError)
        _end_by_failure(end, f"{error}" if is_told else repr(error))
    try:
        EngineLoop(engine, end, heart).run()
    except Exception as error:
        logger.error("the engine ends: %s", error, exc_info=not isinstance(error, EngineLostError))
        _end_by_failure(end, f"{error}")
    end.close()


def _end_by_failure(end: EngineEnd, reason: str) -> None:
    """At once: nothing waits for a device, threads or processes that may not answer."""
    end.send(EngineFailed(reason))
    end.close()
    logging.shutdown()
    os._exit(1)


def _receive(control: socket.socket) -> tuple[Start, socket.socket] | None:
    """The next engine to start; None where the client has gone."""
    data, descriptors, _, _ = socket.recv_fds(control, MAX_START_BYTES, 1)
    if not data:
        return None
    lifeline = socket.socket(fileno=descriptors[0])
    lifeline.setblocking(False)
    return msgspec.msgpack.decode(data, type=Start), lifeline


def _import_all() -> None:
    """What an engine imports, and nothing that starts a thread or touches a device: forks would lack it."""
    given = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's; it would start its threads now
    from toppings.engine import build, loop  # noqa: F401
    from toppings.ops import import_kernels

    os.environ.pop("OPENBLAS_NUM_THREADS")
    if given is not None:
        os.environ["OPENBLAS_NUM_THREADS"] = given
    import_kernels()
    gc.collect()
    gc.freeze()  # what is never collected is never copied


def _report_ends(control: socket.socket) -> None:
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with suppress(OSError):
                control.send(msgspec.msgpack.encode(Ended(*ended)), socket.MSG_DONTWAIT)


def _name_process(name: str) -> None:
    with suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def _start_logging(start: Start) -> None:
    handlers = log_handlers(start.log.file, start.config.max_log_bytes)
    logging.basicConfig(level=start.log.level.upper(), format=LOG_FORMAT, handlers=handlers, force=True)


def _await_begin(end: EngineEnd, is_orphaned: Callable[[], bool]) -> None:
    """Returns at Begin; ends the process where there is none to come."""
    while not isinstance(message := end.receive(BEGIN_POLL_S), Begin):
        if isinstance(message, Shutdown) or is_orphaned():
            raise SystemExit(0)


if __name__ == "__main__":
    main()
