"""Lines of the log that name the request they are about."""

import logging
from collections.abc import Callable

from toppings.bad_input import shown
from toppings.exchanges.exchange import Exchange

MAX_CHARS = 4000


class NamingFormatter(logging.Formatter):
    """Cuts messages, so that no request writes a megabyte to the log, keeps each on its line, and names the
    request that it is about, that of the exchange which `current` finds."""

    def __init__(self, form: str, current: Callable[[], Exchange | None]) -> None:
        super().__init__(form)
        self._current = current

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = shown(record.message, MAX_CHARS).replace("\r", "\\r").replace("\n", "\\n")
        if (exchange := self._current()) is not None:
            record.message += f" [request {exchange.request_id}]"
        return super().formatMessage(record)
