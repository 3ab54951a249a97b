"""One thing that was looked at."""

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    GOOD = "ok"
    NOTE = "note"  # it works, and could work better, or is good to know
    WRONG = "WRONG"  # a server with these settings does not start, or does not do what it is to


@dataclass(frozen=True, slots=True)
class Finding:
    """`advice`: what to change; empty where nothing is to be."""

    topic: str
    level: Level
    text: str
    advice: str = ""


def good(topic: str, text: str) -> Finding:
    return Finding(topic, Level.GOOD, text)


def note(topic: str, text: str, advice: str = "") -> Finding:
    return Finding(topic, Level.NOTE, text, advice)


def wrong(topic: str, text: str, advice: str) -> Finding:
    return Finding(topic, Level.WRONG, text, advice)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
