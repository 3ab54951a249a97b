"""The text of an answer, as it comes, taken apart into reasoning, content and tool calls."""

import secrets
import string
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from toppings.tools.reader import CutError, MalformedError, PiecewiseText, Reading

ARGUMENTS_KEYS = ("arguments", "parameters")
OTHER_KEYS = ("id", "type")
"""What models write into a call besides its name and arguments; it says nothing."""
ID_LEN = 24

Read = Callable[["Parts"], Reading[None]]
"""Reads an answer from its beginning to its end, into the parts it is given."""


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of the answer's call number `index`: the first one has `id` and `name`, the others more of
    `arguments`, which together are a JSON object as the model has written it."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class AnswerDelta:
    """What one piece of text adds to an answer, in the order of the fields."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


def random_id() -> str:
    """As OpenAI makes them."""
    return "call_" + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(ID_LEN))


class Parts:
    """What a format's reader reads from and writes to.

    `names` are the tools that may be called. With `is_single`, the first call is the only one: what follows
    it is dropped. White space around calls is no content.
    """

    def __init__(
        self, names: Collection[str] = (), *, new_id: Callable[[], str] = random_id, is_single: bool = False
    ) -> None:
        self.text = PiecewiseText()
        self.names = names
        self.num_calls = 0
        """That have been read to their end."""
        self._new_id = new_id
        self._is_single = is_single
        self._delta = AnswerDelta()
        self._num_begun = 0
        self._blanks = ""
        self._mark, self._mark_text, self._is_clean = 0, "", True

    @property
    def is_done(self) -> bool:
        """True where nothing that may follow counts."""
        return self._is_single and self.num_calls > 0

    def take_delta(self) -> AnswerDelta:
        delta, self._delta = self._delta, AnswerDelta()
        return delta

    def reason(self, text: str) -> None:
        self._delta.reasoning += text

    def say(self, text: str) -> None:
        """White space is kept back until it is known that more content follows."""
        if self.is_done:
            return
        text = self._blanks + text
        kept = text.rstrip()
        self._blanks = text[len(kept) :]
        self._delta.content += kept

    def end(self) -> None:
        if not self._num_begun:
            self._delta.content += self._blanks
        self._blanks = ""

    def say_until(self, mark: str) -> Reading[bool]:
        """What stands before `mark` is content; false where none comes. Behind calls one that was cut is no
        content."""
        return (yield from self.text.pass_until(mark, self.say, drops_begun=self.num_calls > 0))

    @contextmanager
    def trying(self, mark: str = "") -> Iterator[None]:
        """What is read inside may turn out to be no call, from `mark`, which has been read, on: as far as it
        has not been given away as a call, it is content then, unless it was cut after other calls."""
        self._mark, self._mark_text, self._is_clean = self.text.position, mark, True
        try:
            yield
        except MalformedError as error:
            is_cut = isinstance(error, CutError) and self.num_calls > 0
            if self._is_clean and not is_cut:
                self.text.position = self._mark
                self.say(self._mark_text)

    def call(self, *, is_known: bool = False) -> Reading[None]:
        """A call `{"name": ..., "arguments": {...}}`. Raises MalformedError where it is none; with `is_known`
        also where the name is no tool's."""
        text, name, arguments = self.text, None, None
        yield from text.take("{")
        while True:
            yield from text.skip_blanks()
            key = yield from text.string()
            yield from text.skip_blanks()
            yield from text.take(":")
            yield from text.skip_blanks()
            if key == "name" and name is None:
                name = yield from text.string()
                if is_known and name not in self.names:
                    raise MalformedError(f"there is no tool {name!r}")
            elif key in ARGUMENTS_KEYS and arguments is None:
                arguments = yield from self._arguments(name)
            elif key in OTHER_KEYS:
                yield from text.value()
            else:
                raise MalformedError(f"a call has no {key!r}")
            yield from text.skip_blanks()
            if not (yield from text.try_take(",")):
                break
        yield from text.take("}")
        if name is None:
            raise MalformedError("a call needs a name")
        if arguments is None or self._is_clean:
            self.begin(name)
            self.argue(arguments or "{}")
        self.complete()

    def _arguments(self, name: str | None) -> Reading[str]:
        """As they come where the name is known already, else all at once when it is."""
        if (yield from self.text.peek()) != "{":
            raise MalformedError("arguments are an object")
        if name is None:
            return (yield from self.text.value())
        self.begin(name)
        return (yield from self.text.value(self.argue))

    def named_call(self, name: str) -> Reading[None]:
        """The arguments, an object, of a call whose name has been read. Raises MalformedError."""
        yield from self._arguments(name)
        self.complete()

    def begin(self, name: str) -> None:
        self._is_clean = False
        self._num_begun += 1
        self._blanks = ""
        if not self.is_done:
            self._delta.calls.append(CallDelta(self._num_begun - 1, self._new_id(), name))

    def argue(self, text: str) -> None:
        """More of the arguments of the call that was begun last."""
        if self.is_done:
            return
        calls, index = self._delta.calls, self._num_begun - 1
        if calls and calls[-1].index == index:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + text)
        else:
            calls.append(CallDelta(index, arguments=text))

    def complete(self) -> None:
        """The call that was begun last has ended; what follows may be no call."""
        self.num_calls += 1
        self._mark, self._mark_text, self._is_clean = self.text.position, "", True


def read_content(parts: Parts) -> Reading[None]:
    """An answer without calls."""
    while (yield from parts.text.peek()):
        parts.say(parts.text.rest())


class OutputParser:
    """Pieces of an answer's text in, what they say out. `read` reads it all; it never fails."""

    def __init__(self, read: Read, parts: Parts) -> None:
        self._parts = parts
        self._reading: Reading[None] | None = read(parts)

    @property
    def has_called(self) -> bool:
        return self._parts.num_calls > 0

    @property
    def is_done(self) -> bool:
        return self._parts.is_done

    def push(self, text: str, *, is_last: bool = False) -> AnswerDelta:
        if text:
            self._parts.text.add(text)
        if is_last:
            self._parts.text.end()
        if self._reading is not None and (text or is_last):
            try:
                next(self._reading)
            except StopIteration:
                self._reading = None
        if is_last:
            self._parts.end()
        return self._parts.take_delta()
