"""The engine as a process of its own.

A plain subprocess rather than `multiprocessing`: whoever starts it need not guard its main module. The model
must run on that process's main thread: GNU OpenMP puts its threads to sleep after every operator as soon as
they and the process's other threads outnumber the cores, which costs a third of a decode step.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from toppings.config import EngineConfig
from toppings.core import Begin, EngineFailed, Shutdown
from toppings.engine.transport import EngineEnd

BEGIN_POLL_S = 0.5
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLog:
    """Where the process logs: standard error, and `file` (appended to) where one is named."""

    level: str = "warning"
    file: str = ""


@dataclass(frozen=True)
class _Start:
    config: EngineConfig
    address: str
    parent_pid: int
    log: EngineLog = field(default_factory=EngineLog)


def spawn_engine(config: EngineConfig, address: str, log: EngineLog) -> subprocess.Popen[bytes]:
    """Start a process that serves `config` over the ZeroMQ `address`; it ends with its parent."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "toppings.engine.process"], stdin=subprocess.PIPE, env=environment
    )
    assert process.stdin is not None
    with process.stdin as stdin, suppress(BrokenPipeError):  # the client notices a process that died
        stdin.write(msgspec.msgpack.encode(_Start(config, address, os.getpid(), log)))
    return process


def main() -> None:
    # Ctrl-C reaches the whole process group; the parent decides when the engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=_Start)
    _start_logging(start.log)

    def is_orphaned() -> bool:
        return os.getppid() != start.parent_pid

    end = EngineEnd(start.address)
    try:
        from toppings.engine.build import build_engine
        from toppings.engine.engine import FollowerLostError
        from toppings.engine.loop import EngineLoop

        engine = build_engine(start.config, await_registry=lambda: _await_begin(end, is_orphaned))
    except Exception as error:
        logger.debug("the engine could not start", exc_info=True)
        end.send(EngineFailed(f"{error}" if isinstance(error, ValueError | OSError) else repr(error)))
        end.close()
        raise SystemExit(1) from None
    try:
        EngineLoop(engine, end, is_orphaned=is_orphaned).run()
    except FollowerLostError as error:
        logger.error("the engine ends: %s", error)
        end.close()
        logging.shutdown()
        os._exit(1)  # nothing waits for processes that do not answer; its other followers end with it
    end.close()


def _start_logging(log: EngineLog) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if log.file:
        handlers.append(logging.FileHandler(log.file))
    logging.basicConfig(level=log.level.upper(), format=LOG_FORMAT, handlers=handlers)


def _await_begin(end: EngineEnd, is_orphaned: Callable[[], bool]) -> None:
    """Returns at Begin; ends the process where there is none to come."""
    while not isinstance(message := end.receive(BEGIN_POLL_S), Begin):
        if isinstance(message, Shutdown) or is_orphaned():
            raise SystemExit(0)


if __name__ == "__main__":
    main()
