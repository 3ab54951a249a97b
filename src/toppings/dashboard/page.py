"""The page's files, and the headers that keep everything else out of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "static"
INDEX = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE, STATIC, EVENTS, DATA, ADAPTERS = (
    *("/dashboard", "/dashboard/static/{asset}"),
    *("/dashboard/events", "/dashboard/data", "/dashboard/adapters"),
)
"""Routes. The first two are open to all, since they tell nothing; the others are as `/stats` is."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
DATA_HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store"}
MAX_FIND_CHARS = 256
MAX_ROWS = 200
"""Adapters that are told at once."""


@dataclass(frozen=True, slots=True)
class Asset:
    content: bytes
    content_type: str


def is_page(path: str) -> bool:
    """Whether it is of the page's own files, which tell nothing."""
    return path == PAGE or path.startswith(STATIC.partition("{")[0])


@cache
def assets() -> dict[str, Asset]:
    """All files by name, read once."""
    return {each.name: Asset(each.read_bytes(), TYPES[each.suffix]) for each in FOLDER.iterdir()}


@dataclass(frozen=True, slots=True)
class Search:
    """Which adapters are asked for: `limit` of those whose name contains `find`, from `offset` on."""

    find: str = ""
    offset: int = 0
    limit: int = 50

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "Search":
        """From a URL's query. Raises ValueError, which names what is wrong."""
        find = query.get("find", "")
        if len(find) > MAX_FIND_CHARS:
            raise ValueError(f"find has {len(find)} characters; it may have {MAX_FIND_CHARS}")
        offset = _number(query, "offset", 0, 0, 10**9)
        return cls(find, offset, _number(query, "limit", cls().limit, 1, MAX_ROWS))

    def page(self, names: list[str]) -> tuple[int, list[str]]:
        """How many match, and those of this page."""
        wanted = self.find.casefold()
        matching = [name for name in names if wanted in name.casefold()] if wanted else names
        return len(matching), matching[self.offset : self.offset + self.limit]


def _number(query: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 12 and least <= int(text) <= most):
        raise ValueError(f"{name} is {text[:64]!r}; it must be a number from {least} to {most}")
    return int(text)
