"""The engine as a process of its own."""

import logging
import multiprocessing
import os
import signal
from multiprocessing.process import BaseProcess

from toppings.config import EngineConfig
from toppings.core import EngineFailed


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

    end = ZmqEngineEnd(address)
    try:
        from toppings.engine.build import build_engine
        from toppings.engine.loop import EngineLoop

        engine = build_engine(config)
    except Exception as error:
        logging.getLogger(__name__).debug("the engine could not start", exc_info=True)
        end.send(EngineFailed(f"{error}" if isinstance(error, ValueError | OSError) else repr(error)))
        end.close()
        raise SystemExit(1) from error
    EngineLoop(engine, end, is_orphaned=lambda: os.getppid() != parent_pid).run()
    end.close()
