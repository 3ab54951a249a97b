"""The smallest number for which something holds, found with few questions, several asked at once."""

from collections.abc import Callable, Sequence

Holds = Callable[[Sequence[int]], Sequence[bool]]
"""Of several numbers at once, for which of them it holds."""


def smallest(holds: Holds, guess: int, *, stride: int, most: int, width: int = 1) -> int | None:
    """Of 1 … `most`; None where it does not hold for `most` either. What holds is taken to hold for all
    numbers above, too; where answers contradict that, the largest number that failed counts.

    The first question is about `guess` and `guess - stride`; strides double until the answer lies between
    two numbers, and then `width` numbers between them are asked about at once.
    """
    answers: dict[int, bool] = {0: False}
    asked = sorted({min(max(guess, 1), most), min(max(guess - stride, 1), most)})
    while True:
        answers |= dict(zip(asked, holds(asked), strict=True))
        below = max(number for number, is_held in answers.items() if not is_held)
        above = min((number for number, is_held in answers.items() if is_held and number > below), default=0)
        if below == most:
            return None
        if above and above - below == 1:
            return above
        if not above:
            asked = sorted({min(below + stride, most), min(below + 2 * stride, most)})[:width]
            stride *= 2
        elif not below:
            asked = [max(above - stride, 1)]
            stride *= 2
        else:
            asked = between(below, above, width)


def between(below: int, above: int, width: int) -> list[int]:
    """At most `width` numbers that part the ones between evenly."""
    parts = min(width + 1, above - below)
    return sorted({below + (above - below) * part // parts for part in range(1, parts)})
