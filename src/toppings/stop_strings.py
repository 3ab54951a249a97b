"""Stop strings in a text that comes piece by piece."""

from collections.abc import Sequence


class StopMatcher:
    """Lets text through up to the first stop string; holds back what might yet become one."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._begun = [_BegunStop(stop) for stop in dict.fromkeys(stops)]
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text to show now, and the stop string that ended it, if one did."""
        new, text = text, self._held + text
        found = [(start, -len(b.stop), b.stop) for b in self._begun if (start := text.find(b.stop)) >= 0]
        if found:
            start, _, stop = min(found)
            self._held = ""
            return text[: start + len(stop)] if self._include_stop else text[:start], stop
        num_held = max((begun.push(new) for begun in self._begun), default=0)
        cut = len(text) - num_held
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class _BegunStop:
    """How much of one stop string the end of the text is (Knuth-Morris-Pratt): constant time a character.

    `_borders[k]` is the length of the longest proper end of `stop[:k]` that begins `stop`, as far as needed.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self._num_matched = 0
        self._borders = [0, 0]

    def push(self, text: str) -> int:
        for char in text:
            self._num_matched = self._longer(self._num_matched, char)
        return self._num_matched

    def _longer(self, length: int, char: str) -> int:
        while length and (length == len(self.stop) or self.stop[length] != char):
            length = self._border(length)
        return length + (self.stop[length] == char)

    def _border(self, length: int) -> int:
        while len(self._borders) <= length:
            end = len(self._borders) - 1
            self._borders.append(self._longer(self._borders[end], self.stop[end]))
        return self._borders[length]
