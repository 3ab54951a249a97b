"""Who may use an adapter that another's token has brought: whose own token its source gives it for, too."""

import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial

from toppings.adapters.latest import Latest
from toppings.server.errors import ApiError
from toppings.server.lookups import Lookups, not_given
from toppings.sources.fetch import FetchDenied, FetchError, FetchNotFound

logger = logging.getLogger(__name__)

MAX_GRANTS = 4096
OUTLIVES_S = 3600.0
"""How long what was given counts while the source that gave it does not answer."""
RETRY_S = 60.0
"""After how long such a source is asked again."""


class Grants:
    """Used from one event loop only. `find` looks for a name in the sources of a kind with a token, and may
    raise FetchError; what it has given counts for `lasts_s`."""

    def __init__(self, find: Callable[[str, str, str], Awaitable[object]], lasts_s: float) -> None:
        self._find, self._lasts_s = find, lasts_s
        self._lookups: Lookups[None] = Lookups()
        self._given: Latest[tuple[str, str], tuple[float, float]] = Latest(MAX_GRANTS)
        """When, and until when it counts without asking."""

    async def check(self, name: str, kind: str, token: str | None) -> None:
        """Raises ApiError 403 where it is not given, 502 where that is not to be known."""
        if token is None:
            message = f"adapter {name!r} is restricted: send the api_token of an account that may read it"
            raise ApiError(403, message, "PermissionDeniedError")
        mark, now = mark_of(token), time.monotonic()
        given_at, until = self._given.get((name, mark), (-math.inf, -math.inf))
        if now < until:
            return
        try:
            await self._lookups.once((name, kind, mark), partial(self._ask, name, kind, token))
        except ApiError as error:
            if error.status == 403:
                self._given.pop((name, mark), None)
            if error.status not in (502, 503) or now >= given_at + OUTLIVES_S:
                raise
            logger.warning("adapter %s is given to who had it before: %s", name, error)
            self._given[name, mark] = (given_at, now + RETRY_S)

    def note(self, name: str, token: str | None) -> None:
        """It was given for this token."""
        now = time.monotonic()
        self._given[name, mark_of(token)] = (now, now + self._lasts_s)

    def close(self) -> None:
        self._lookups.close()

    async def _ask(self, name: str, kind: str, token: str) -> None:
        try:
            await self._find(name, kind, token)
        except (FetchNotFound, FetchDenied) as error:
            raise ApiError(403, f"adapter {name!r}: {error}", "PermissionDeniedError") from error
        except FetchError as error:
            raise not_given(name, error) from error
        self.note(name, token)


def mark_of(token: str | None) -> str:
    """Stands for a token, which is not kept."""
    return "" if token is None else hashlib.sha256(token.encode()).hexdigest()
