"""How a value that cannot be served is refused, and told without sending all of it back."""

MAX_INT = 2**31 - 1
"""Largest count or token id of a request: all of them fit the integers of messages and kernels."""
MAX_SHOWN_CHARS = 200


def shown(value: object, max_chars: int = MAX_SHOWN_CHARS) -> str:
    """`value` as a message or a log line may hold it: cut, and without halves of UTF-16 pairs."""
    text = value if isinstance(value, str) else _text_of_number(value)
    num_more = len(text) - max_chars
    if num_more > 0:
        text = f"{text[:max_chars]}... ({num_more} more characters)"
    return text.encode("utf-8", "backslashreplace").decode()


def _text_of_number(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # Python writes no integers of more than 4300 digits
        return "an integer of more than 4300 digits"


def check_unicode(name: str, text: str) -> None:
    """Raises RequestError for a text that UTF-8 cannot write: one that holds half of a UTF-16 pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise RequestError(
            f"{name} is no valid Unicode: character {error.start} is {half}, half of a surrogate pair"
        ) from None


class RequestError(ValueError):
    """The request cannot be served; the message names the offending value and what would be right."""


class ContextLengthError(RequestError):
    """A prompt is too long for the model's context, alone or with the output that was asked for.

    The message begins as OpenAI's does: clients look for that to shorten their prompts. `asked` says what
    there is too much of; `num_tokens` counts it, at least.
    """

    def __init__(self, limit: int, num_tokens: int, asked: str) -> None:
        self.limit, self.num_tokens = limit, num_tokens
        super().__init__(f"This model's maximum context length is {limit} tokens. However, {asked}")
