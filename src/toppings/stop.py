"""What ends a server or a router: a signal, and the bound on what comes after it."""

import asyncio
import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager

LAST_RESORT_S = 20.0
"""How long an orderly end may take beyond `shutdown_timeout_s`."""
TRACEBACK_S = 1.0
"""How long the traceback of one that took longer may take to be written."""


class Stop:
    """SIGINT or SIGTERM, as something to wait for. Some time after a signal, sooner after a second one, the
    process ends in any case, whatever threads or loops hang."""

    def __init__(self, timeout_s: float = 0.0) -> None:
        self.is_set = False
        self._timeout_s = timeout_s
        self._event = asyncio.Event()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._take_signal)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _take_signal(self) -> None:
        limit_s = LAST_RESORT_S + (0.0 if self.is_set else self._timeout_s)
        faulthandler.dump_traceback_later(limit_s, exit=True)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel's: nobody may read what it writes
        signal.setitimer(signal.ITIMER_REAL, limit_s + TRACEBACK_S)
        self.set()

    def set(self) -> None:
        self.is_set = True
        self._event.set()

    def rearm(self) -> None:
        """Wait for another signal."""
        self._event.clear()

    async def or_done(self, *tasks: "asyncio.Task[object]") -> None:
        """Until a signal, or until one of `tasks` has ended; neither is touched."""
        signalled = asyncio.create_task(self._event.wait())
        try:
            await asyncio.wait({signalled, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            signalled.cancel()
