"""What ends a server: a signal, and the bound on what comes after it."""

import asyncio
import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager

LAST_RESORT_S = 20.0
"""How long an orderly end may take beyond `shutdown_timeout_s`."""


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
        is_second = self.is_set
        faulthandler.dump_traceback_later(LAST_RESORT_S + (0.0 if is_second else self._timeout_s), exit=True)
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
