"""The engine as a process of its own."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from toppings.config import EngineConfig
from toppings.core import Begin, EngineFailed, Shutdown

if TYPE_CHECKING:
    from toppings.engine.zmq_transport import ZmqEngineEnd

BEGIN_POLL_S = 0.5


def spawn_engine(config: EngineConfig, address: str) -> BaseProcess:
    """Start a process that serves `config` over the ZeroMQ `address`; it ends with its parent."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(
        target=_main, args=(config, address, os.getpid()), name="toppings-engine", daemon=True
    )
    process.start()
    return process


def _main(config: EngineConfig, address: str, parent_pid: int) -> None:
    # Ctrl-C reaches the whole process group; the parent decides when the engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine: %(message)s")
    from toppings.engine.zmq_transport import ZmqEngineEnd

    def is_orphaned() -> bool:
        return os.getppid() != parent_pid

    end = ZmqEngineEnd(address)
    try:
        from toppings.engine.build import build_engine
        from toppings.engine.loop import EngineLoop

        engine = build_engine(config, await_registry=lambda: _await_begin(end, is_orphaned))
    except Exception as error:
        logging.getLogger(__name__).debug("the engine could not start", exc_info=True)
        end.send(EngineFailed(f"{error}" if isinstance(error, ValueError | OSError) else repr(error)))
        end.close()
        raise SystemExit(1) from error
    EngineLoop(engine, end, is_orphaned=is_orphaned).run()
    end.close()


def _await_begin(end: "ZmqEngineEnd", is_orphaned: Callable[[], bool]) -> None:
    """Returns at Begin; ends the process where there is none to come."""
    while not isinstance(message := end.receive(BEGIN_POLL_S), Begin):
        if isinstance(message, Shutdown) or is_orphaned():
            raise SystemExit(0)
