"""What a benchmark aims for: a figure, the limit it is held against, and whether it keeps to that."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Aim:
    what: str
    value: float
    limit: str
    is_met: bool


def at_most(what: str, value: float, limit: float) -> Aim:
    return Aim(what, value, f"<= {limit:g}", value <= limit)


def at_least(what: str, value: float, limit: float) -> Aim:
    return Aim(what, value, f">= {limit:g}", value >= limit)
