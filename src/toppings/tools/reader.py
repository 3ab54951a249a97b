"""Text that arrives in pieces, read by generators: each `yield` waits for the next piece.

A reader is so written as if the text were there in full, whatever tokens it comes in.
"""

import json
import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]

BLANKS = " \t\r\n"
IN_VALUE = re.compile(r'["{}\[\]]')
IN_STRING = re.compile(r'["\\]')
SCALAR_END = re.compile(r"[,\]}\s]")
NO_JSON = re.compile(r"[^-+.0-9aefilnrstuyEIN,:\s]")
"""What stands in no JSON but within strings and as brackets: marks of calls do not, so that a value which was
begun ends where the next call does begin."""


class MalformedError(ValueError):
    """The text is not what was begun; it is content then."""


class CutError(MalformedError):
    """The text ends within what was begun."""


class PiecewiseText:
    """What has come and has not been read lies between `position` and the end."""

    def __init__(self) -> None:
        self._text = ""
        self._is_ended = False
        self.position = 0
        """In characters, from the beginning of what `forget` has left."""

    def add(self, text: str) -> None:
        self._text += text

    def end(self) -> None:
        """No more text will come."""
        self._is_ended = True

    def forget(self) -> None:
        """Nothing that has been read will be asked for again."""
        self._text, self.position = self._text[self.position :], 0

    def rest(self) -> str:
        """All that has come and has not been read; it is forgotten."""
        rest = self._text[self.position :]
        self._text, self.position = "", 0
        return rest

    def since(self, start: int) -> str:
        """What was read from the position `start` on."""
        return self._text[start : self.position]

    def peek(self) -> Reading[str]:
        """The next character; empty at the end."""
        while self.position == len(self._text) and not self._is_ended:
            yield
        return self._text[self.position : self.position + 1]

    def skip_blanks(self) -> Reading[None]:
        while (char := (yield from self.peek())) and char in BLANKS:
            self.position += 1

    def take(self, literal: str) -> Reading[None]:
        """Raises MalformedError where something else follows."""
        for char in literal:
            if (found := (yield from self.peek())) != char:
                raise (MalformedError if found else CutError)(f"{literal!r} does not follow")
            self.position += 1

    def try_take(self, literal: str) -> Reading[bool]:
        """False, and nothing is read, where something else follows."""
        start = self.position
        try:
            yield from self.take(literal)
        except MalformedError:
            self.position = start
            return False
        return True

    def skip_mark(self, mark: str) -> Reading[None]:
        """Reads `mark`, or as much of it as there is where the text ends within it; else nothing."""
        start = self.position
        for char in mark:
            if (found := (yield from self.peek())) != char:
                if found:
                    self.position = start
                return
            self.position += 1

    def pass_until(
        self, mark: str, give: Callable[[str], object], *, drops_begun: bool = False
    ) -> Reading[bool]:
        """Gives away what stands before `mark`, and reads it; false where the text ends without one.

        Held back is only what may be the beginning of `mark`; with `drops_begun` also where the text ends
        within it. What was read before is forgotten.
        """
        while True:
            self.forget()
            start = self._text.find(mark)
            is_whole = self._is_ended and not drops_begun
            end = start if start >= 0 else len(self._text) - (0 if is_whole else self._begun(mark))
            give(self._text[:end])
            self.position = end
            if start >= 0:
                self.position += len(mark)
                return True
            if self._is_ended:
                return False
            yield

    def _begun(self, mark: str) -> int:
        """How many characters at the end of the text begin `mark`."""
        return next((n for n in range(len(mark) - 1, 0, -1) if self._text.endswith(mark[:n])), 0)

    def string(self) -> Reading[str]:
        """A JSON string, decoded. Raises MalformedError, also for half a surrogate pair: that is no text."""
        raw = yield from self.value()
        text = json.loads(raw)
        if not isinstance(text, str):
            raise MalformedError(f"a string was expected, not {raw[:40]}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise MalformedError(f"{raw[:40]} holds half a surrogate pair") from None
        return text

    def value(self, give: Callable[[str], object] | None = None) -> Reading[str]:
        """A JSON value as it is written, given away piece by piece, too. Raises MalformedError: where nothing
        is given away, and the text may have to be read once more, at the first character that is wrong."""
        start, depth = self.position, 0
        while True:
            char = yield from self._next_in_value()
            if char == '"':
                yield from self._pass_string(give)
            elif char in "{}[]":
                depth += 1 if char in "{[" else -1
                self._pass(1, give)
            elif depth:
                self._pass_to(IN_VALUE, give, is_plain=True)
            else:
                yield from self._pass_scalar(give)
            if depth <= 0:
                break
        raw = self.since(start)
        try:
            json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise MalformedError(f"it is no JSON: {error}") from None
        return raw

    def _pass_string(self, give: Callable[[str], object] | None) -> Reading[None]:
        self._pass(1, give)
        while (char := (yield from self._next_in_value())) != '"':
            if char == "\\":
                self._pass(1, give)
                yield from self._next_in_value()
                self._pass(1, give)
            else:
                self._pass_to(IN_STRING, give)
        self._pass(1, give)

    def _pass_scalar(self, give: Callable[[str], object] | None) -> Reading[None]:
        while (char := (yield from self.peek())) and SCALAR_END.match(char) is None:
            self._pass(1, give, is_plain=True)

    def _next_in_value(self) -> Reading[str]:
        if not (char := (yield from self.peek())):
            raise CutError("the text ends within a JSON value")
        return char

    def _pass_to(
        self, pattern: re.Pattern[str], give: Callable[[str], object] | None, *, is_plain: bool = False
    ) -> None:
        """Gives away what stands before a match, or all that has come."""
        found = pattern.search(self._text, self.position)
        num_chars = (len(self._text) if found is None else found.start()) - self.position
        self._pass(num_chars, give, is_plain=is_plain)

    def _pass(self, num_chars: int, give: Callable[[str], object] | None, *, is_plain: bool = False) -> None:
        """`is_plain`: outside of strings. Raises MalformedError."""
        start = self.position
        self.position += num_chars
        if give is not None:
            give(self.since(start))
        elif is_plain and (wrong := NO_JSON.search(self._text, start, self.position)):
            raise MalformedError(f"{wrong[0]!r} is no JSON")
