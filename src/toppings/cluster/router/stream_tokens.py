"""The tokens of a streamed answer: as its `usage` says, and until then the events that have more of it."""

import msgspec

from toppings.cluster.router.calls import MESSAGES, NO_JSON, RESPONSES, Usage

MAX_LINE_BYTES = 2**20
"""Longer lines are not looked into."""
GROWTH = {RESPONSES: b".delta", MESSAGES: b"content_block_delta"}
"""How events with more of the answer are named, where events have names."""


class _Delta(msgspec.Struct):
    role: str | None = None
    content: msgspec.Raw = msgspec.Raw(b"null")
    reasoning: msgspec.Raw = msgspec.Raw(b"null")
    reasoning_content: msgspec.Raw = msgspec.Raw(b"null")
    tool_calls: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def is_start(self) -> bool:
        """It says whose answer it is, and nothing of it."""
        parts = (self.content, self.reasoning, self.reasoning_content, self.tool_calls)
        return self.role is not None and all(bytes(part) in (b"null", b'""', b"[]") for part in parts)


class _Choice(msgspec.Struct):
    delta: _Delta | None = None


class _Inner(msgspec.Struct):
    usage: Usage | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    response: _Inner | None = None
    message: _Inner | None = None


_decoder = msgspec.json.Decoder(_Event)


class StreamTokens:
    """Follows the bytes of a stream of the route `path`. `prompt` and `answer` are what it has said of its
    tokens last; None where it has not."""

    def __init__(self, path: str) -> None:
        self._growth = GROWTH.get(path)
        self._rest = b""
        self.prompt: int | None = None
        self.answer: int | None = None

    def note(self, chunk: bytes) -> int:
        """How many events that are whole by now have more of the answer."""
        *lines, rest = (self._rest + chunk).split(b"\n")
        self._rest = rest if len(rest) <= MAX_LINE_BYTES else rest[:1]
        return sum(map(self._note_line, lines))

    def _note_line(self, line: bytes) -> bool:
        field, _, value = line.rstrip(b"\r").partition(b":")
        value = value.strip()
        if field == b"event":
            return self._growth is not None and value.endswith(self._growth)
        if field != b"data" or value == b"[DONE]" or (self._growth and b'"usage"' not in value):
            return False
        try:
            event = _decoder.decode(value)
        except NO_JSON:
            return self._growth is None
        for part in (event, event.response, event.message):
            self._note_usage(None if part is None else part.usage)
        if event.choices is None:
            return self._growth is None and event.usage is None
        is_start = all(choice.delta is not None and choice.delta.is_start for choice in event.choices)
        return not is_start

    def _note_usage(self, usage: Usage | None) -> None:
        if usage is not None:
            self.prompt = self.prompt if usage.prompt is None else usage.prompt
            self.answer = self.answer if usage.answer is None else usage.answer
