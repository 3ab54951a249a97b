"""Texts such as `gamma:4` or `fixed:128:64`: a name and its numbers, as the command line takes them."""

from collections.abc import Mapping


def parse_spec(
    text: str, defaults: Mapping[str, tuple[float | None, ...]], *, kind: str
) -> tuple[str, tuple[float, ...]]:
    """The name and its parameters; those not given come from `defaults`, None there meaning that they must
    be.

    Raises ValueError for an unknown name, too many or too few numbers, or one that is none or not above 0.
    """
    name, *given = text.split(":")
    if name not in defaults:
        raise ValueError(f"unknown {kind} {name!r}; choose one of {', '.join(defaults)}")
    wanted = defaults[name]
    if len(given) > len(wanted):
        raise ValueError(f"{kind} {text!r} has {len(given)} numbers; {name} takes at most {len(wanted)}")
    values = [_positive(number, text, kind) for number in given] + list(wanted[len(given) :])
    if None in values:
        raise ValueError(f"{kind} {text!r} lacks a number; write {':'.join([name, *['N'] * len(wanted)])}")
    return name, tuple(value for value in values if value is not None)


def _positive(number: str, text: str, kind: str) -> float | None:
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ValueError(f"{kind} {text!r}: {number!r} is not a number above 0")
    return value
