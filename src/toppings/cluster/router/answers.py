"""What makes a server's answer one: its form is looked at before any of it reaches the client."""

from dataclasses import dataclass

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from toppings.cluster.router import replies
from toppings.cluster.router.calls import MESSAGES, RESPONSES, Usage, read_usage
from toppings.cluster.router.upstream import read_bounded

RETRIED_STATUSES = frozenset({429, 500, 502, 503, 504})
EVENT_STARTS = (b"data:", b"event:", b"id:", b"retry:", b":", b"\n", b"\r")
END_OF_STREAM = b"[DONE]"
TAIL_LEN = 16
EVENT_NAME = b"\nevent: "
LAST_EVENTS = {
    RESPONSES: (b"response.completed", b"response.incomplete", b"response.failed", b"error"),
    MESSAGES: (b"message_stop", b"error"),
}
"""Of routes whose events have names: one of these ends a stream. None stands inside of data: JSON has no line
feeds."""
NAME_LEN = len(EVENT_NAME) + max(len(name) for names in LAST_EVENTS.values() for name in names) + 1


class BadAnswerError(Exception):
    """What the server sent is no answer of this API; the message says why."""


@dataclass(slots=True)
class Whole:
    """An answer that was read to its end."""

    status: int
    headers: CIMultiDict[str]
    body: bytes

    def response(self) -> web.Response:
        return web.Response(body=self.body, status=self.status, headers=self.headers)


async def read_start(answer: aiohttp.ClientResponse, max_bytes: int) -> tuple[bytes, bool]:
    """A stream's first bytes, and True; or all of an answer of another kind, and False.

    Raises BadAnswerError, and what aiohttp raises.
    """
    if not 200 <= answer.status < 300 and answer.status < 400:
        raise BadAnswerError(f"answered {answer.status}")
    if answer.content_type != replies.EVENT_STREAM or answer.status in RETRIED_STATUSES:
        return await read_bounded(answer, max_bytes), False
    first = await answer.content.readany()
    if answer.status == 200:
        check_event(first)
        check_last_event(first)
    return first, True


def check_event(start: bytes) -> None:
    """Raises BadAnswerError where an event cannot begin so."""
    if not start:
        raise BadAnswerError("ended its stream before the first event")
    if not any(start.startswith(each) or each.startswith(start) for each in EVENT_STARTS):
        raise BadAnswerError("sent what is no event")


def check_whole(whole: Whole) -> Usage:
    """The numbers of tokens that the answer tells. Raises BadAnswerError for a 200 that is no JSON object."""
    if whole.status != 200:
        return Usage()
    try:
        usage = read_usage(whole.body)
    except ValueError as error:
        raise BadAnswerError("answered 200 with what is no JSON") from error
    if whole.body.lstrip()[:1] not in (b"{", b"["):
        raise BadAnswerError("answered 200 with JSON that is no object")
    return usage


def check_last_event(chunk: bytes) -> None:
    """Raises BadAnswerError where what follows the last event of a chunk cannot be one."""
    _, end, start = chunk.rpartition(b"\n\n")
    if end and start:
        check_event(start)


class StreamWatch:
    """Follows a stream's bytes, which pass on as they come: is it between events, has it come to its end?"""

    def __init__(self, path: str, status: int) -> None:
        self._has_mark = status == 200 and path.startswith("/v1/")
        self._last_events = LAST_EVENTS.get(path)
        self._is_checked = status == 200
        self._tail = b"\n"
        self._name = b""

    @property
    def is_between_events(self) -> bool:
        return self._tail.endswith((b"\n\n", b"\r\n\r\n"))

    def check_next(self, chunk: bytes) -> None:
        """Raises BadAnswerError where an event should begin and none does."""
        if self._is_checked and self.is_between_events:
            check_event(chunk)
        if self._is_checked:
            check_last_event(chunk)

    def note(self, chunk: bytes) -> None:
        if self._last_events is not None:
            self._note_name(chunk)
        self._tail = (self._tail + chunk[-TAIL_LEN:])[-TAIL_LEN:]

    def _note_name(self, chunk: bytes) -> None:
        """Keeps how the last event begins: with its name."""
        seen = self._tail + chunk
        start = seen.rfind(EVENT_NAME)
        self._name = (self._name + chunk if start < 0 else seen[start:])[:NAME_LEN]

    def check_end(self) -> None:
        """Raises BadAnswerError where a stream of the OpenAI or Anthropic routes ends before it says so."""
        if self._last_events is not None:
            name = self._name.removeprefix(EVENT_NAME).partition(b"\n")[0].strip()
            if self._has_mark and name not in self._last_events:
                raise BadAnswerError("ended the stream without its last event")
        elif self._has_mark and not self._tail.rstrip().endswith(END_OF_STREAM):
            raise BadAnswerError("ended the stream without [DONE]")
