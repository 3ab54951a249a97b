"""Until when a key opens: how that is written, and who is told of it beforehand."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from toppings.settings import ConfigError
from toppings.tenants.refusals import duration

logger = logging.getLogger(__name__)

FORM = "%Y-%m-%dT%H:%M:%SZ"
HINT = (
    "write a time from now on in hours, days or weeks, as 12h, 90d or 52w, or an instant, as 2027-01-31 or"
    " 2027-01-31T12:00:00Z"
)
DAY_S = 86400.0
STAGES_S = (7 * DAY_S, DAY_S, 0.0)
"""Of a key's end: how long before it the log says so, once each."""
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def read_instant(text: str) -> datetime:
    """From ISO 8601; without a zone it is UTC. Raises ValueError."""
    instant = datetime.fromisoformat(text)
    return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).astimezone(UTC)


def read_expiry(text: str, now: datetime) -> str:
    """The instant (`FORM`) that `text` means, which is an instant, or a time from `now` on.

    Raises ConfigError for another text, and for what is not after `now`.
    """
    try:
        if span := re.fullmatch(r"(\d{1,9})([hdw])", text.strip()):
            until = now + timedelta(**{_UNITS[span[2]]: int(span[1])})
        else:
            until = read_instant(text.strip())
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"expires is {text[:80]!r}; {HINT}") from error
    if until <= now:
        raise ConfigError(f"expires is {text[:80]!r}, which is over; {HINT}")
    return until.strftime(FORM)


@dataclass(frozen=True, slots=True)
class Ending:
    """A key that ends at `until`, in Unix time; `text` is what the file has."""

    until: float
    key_id: str
    tenant: str
    text: str


class Endings:
    """Warns in the log, of each key once at each stage. Used from one thread at a time."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str], int] = {}

    def tell(self, endings: Iterable[Ending], now: float) -> None:
        """`endings`: all that there are, the first first; `now` in Unix time."""
        told = {}
        for ending in endings:
            left_s = ending.until - now
            if left_s > STAGES_S[0]:
                break
            stage = sum(left_s <= stage_s for stage_s in STAGES_S)
            key = (ending.key_id, ending.text)
            if stage > self._told.get(key, 0):
                left = f"{left_s / DAY_S:.1f} days" if left_s >= DAY_S else duration(left_s)
                when = "has expired" if left_s <= 0 else f"expires in {left}"
                logger.warning("key %s of tenant %s %s (%s)", ending.key_id, ending.tenant, when, ending.text)
            told[key] = stage
        self._told = told
