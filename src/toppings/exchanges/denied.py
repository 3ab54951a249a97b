"""How many lines a log has of what was denied: whoever has no key must not push out what was done."""

import time
from collections.abc import Callable

from toppings.tenants.account import Bucket

DENIED = (401, 403)
DENIED_PER_MINUTE = 5
"""Lines. Of the audit log's, a day of them takes less than 10 MB."""


class DeniedLines:
    """Used from one event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bucket = Bucket(clock())
        self._num_untold = 0

    def tell(self) -> dict[str, int] | None:
        """What the next line says of those that were left out; None where it is to be left out itself."""
        now = self._clock()
        if self._bucket.level(DENIED_PER_MINUTE, now) < 1:
            self._num_untold += 1
            return None
        self._bucket.spend(1, DENIED_PER_MINUTE, now)
        num_untold, self._num_untold = self._num_untold, 0
        return {"untold": num_untold} if num_untold else {}
