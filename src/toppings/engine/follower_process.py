"""The process of one part of a split model.

It ends with its lead, however that ends: the watcher sees the lead's end of the connection close, even while
the main thread waits for a sum that never comes.
"""

import logging
import os
import select
import signal
import socket
import sys
import threading
from multiprocessing.connection import Connection
from typing import NoReturn

from toppings.engine.heartbeat import Heartbeat


def main(fd: int, lifeline_fd: int) -> None:
    """Of the sockets that lead to the lead: for messages, and for beats (heartbeat.py)."""
    # Ctrl-C reaches the whole process group; the lead decides when its followers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_lead, args=(fd,), daemon=True).start()
    lifeline = socket.socket(fileno=lifeline_fd)
    lifeline.setblocking(False)
    Heartbeat(lifeline)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logger = logging.getLogger("toppings.follower")
    from toppings.engine.follower import Follower  # torch: slow to import, and the lead may end meanwhile

    connection = Connection(fd)
    try:
        follower = Follower.start(connection)
    except Exception as error:
        logger.debug("the follower could not start", exc_info=True)
        reason = f"{error}" if isinstance(error, ValueError | OSError) else repr(error)
        Follower.send_failure(connection, reason)
        _exit(1)
    try:
        follower.run()
    except Exception:
        logger.exception("the follower cannot go on")
        _exit(1)
    follower.close()
    _exit(0)


def _end_with_lead(fd: int) -> None:
    hang_up = select.poll()
    hang_up.register(fd, 0)
    hang_up.poll()
    os._exit(0)


def _exit(code: int) -> NoReturn:
    """Without the interpreter's tear-down, which other libraries' threads may not survive."""
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
