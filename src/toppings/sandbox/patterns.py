"""Python's own regular expressions, many at once. It runs in a sandbox, too: the standard library alone."""

import re
import warnings

MAX_SHOWN_CHARS = 200


def match_all(patterns: list[str], names: list[str], *, is_full: bool = False) -> list[dict[str, str]]:
    """Per pattern, the names that `re.match` (`is_full`: `re.fullmatch`) accepts, each with its group `idx`,
    "" where the pattern has none.

    Raises ValueError for what is no pattern.
    """
    found = []
    for pattern in patterns:
        compiled = _compile(pattern)
        match = compiled.fullmatch if is_full else compiled.match
        matches = {name: result for name in names if (result := match(name)) is not None}
        found.append({name: result.groupdict().get("idx") or "" for name, result in matches.items()})
    return found


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constructs that will mean something else one day
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern[:MAX_SHOWN_CHARS]!r} is not a valid pattern: {error}") from error
