"""What a model thinks before it answers, between `<think>` and `</think>`."""

from toppings.tools.output import Parts, Read
from toppings.tools.reader import BLANKS, Reading

BEGIN, END = MARKS = "<think>", "</think>"


def is_begun(prompt: str) -> bool:
    """True where the prompt's template has written the beginning for the model."""
    return prompt.rstrip(BLANKS).endswith(BEGIN)


def is_over(prompt: str) -> bool:
    """True where the template has written the end too, so that the model does not think."""
    return prompt.rstrip(BLANKS).endswith(END)


def is_open(text: str) -> bool:
    """True for the beginning of an answer that ends within thoughts."""
    return text.rfind(BEGIN) > text.rfind(END)


def after_reasoning(read: Read, *, is_begun: bool) -> Read:
    """Reads thoughts first, where there are any, and the answer with `read`."""

    def read_both(parts: Parts) -> Reading[None]:
        yield from _read_thoughts(parts, is_begun)
        yield from read(parts)

    return read_both


def _read_thoughts(parts: Parts, is_begun: bool) -> Reading[None]:
    text = parts.text
    start = text.position
    yield from text.skip_blanks()
    if not (yield from text.try_take(BEGIN)) and not is_begun:
        text.position = start
        return
    yield from text.skip_blanks()
    trimmed = _Trimmed(parts)
    yield from text.pass_until(END, trimmed.push)
    yield from text.skip_blanks()


class _Trimmed:
    """Thoughts without the white space at their end."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._blanks = ""

    def push(self, text: str) -> None:
        text = self._blanks + text
        kept = text.rstrip()
        self._blanks = text[len(kept) :]
        self._parts.reason(kept)
