"""Python's own regular expressions, many at once; the standard library alone, for it also runs in a sandbox."""

import re
import warnings


def match_all(patterns: list[str], names: list[str]) -> list[dict[str, str]]:
    """Per pattern, the names that `re.match` accepts, each with its group `idx` ("" where there is none).

    Raises re.error, OverflowError or RecursionError for what is no pattern.
    """
    found = []
    for pattern in patterns:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constructs that will mean something else one day
            compiled = re.compile(pattern)
        matches = {name: match for name in names if (match := compiled.match(name)) is not None}
        found.append({name: match.groupdict().get("idx") or "" for name, match in matches.items()})
    return found
