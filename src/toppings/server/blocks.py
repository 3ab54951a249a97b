"""A chat's answer as the blocks that it consists of, one after the other: thoughts, text, calls."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from toppings.core import FinishReason
from toppings.server.chat_job import ChatChoice, ChatOutput


class Kind(Enum):
    THOUGHTS = "thoughts"
    TEXT = "text"
    CALL = "call"


class Step(Enum):
    BEGUN = "begun"
    GROWN = "grown"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Block:
    """`text` is all of it so far: of a call the text of its arguments, which are a JSON object."""

    kind: Kind
    index: int
    call_id: str = ""
    name: str = ""
    text: str = ""
    is_cut: bool = False
    """Whether the answer was too long here, so that more would have followed."""


class Blocks:
    """Outputs in, what becomes of blocks out; `done` are those that have ended."""

    def __init__(self) -> None:
        self.done: list[Block] = []
        self._open: Block | None = None
        self._call: int | None = None

    def push(self, output: ChatOutput) -> Iterator[tuple[Step, Block, str]]:
        """Each step with its block and, where it has grown, by what."""
        for kind, text in ((Kind.THOUGHTS, output.reasoning), (Kind.TEXT, output.text)):
            if text:
                yield from self._enter(kind)
                yield self._grow(text)
        for delta in output.calls:
            if delta.index != self._call:
                self._call = delta.index
                yield from self.end()
                yield self._begin(Kind.CALL, delta.id or "", delta.name or "")
            if delta.arguments:
                yield self._grow(delta.arguments)
        if output.finish_reason is not None:
            if self._open is not None:
                self._open.is_cut = output.finish_reason == FinishReason.LENGTH
            yield from self.end()

    def end(self) -> Iterator[tuple[Step, Block, str]]:
        if self._open is not None:
            self.done.append(self._open)
            yield Step.ENDED, self._open, ""
            self._open = None

    def _enter(self, kind: Kind) -> Iterator[tuple[Step, Block, str]]:
        if self._open is None or self._open.kind is not kind:
            yield from self.end()
            yield self._begin(kind)

    def _begin(self, kind: Kind, call_id: str = "", name: str = "") -> tuple[Step, Block, str]:
        self._open = Block(kind, len(self.done), call_id, name)
        return Step.BEGUN, self._open, ""

    def _grow(self, text: str) -> tuple[Step, Block, str]:
        assert self._open is not None
        self._open.text += text
        return Step.GROWN, self._open, text


def blocks_of(choice: ChatChoice) -> list[Block]:
    """Of a whole answer."""
    found = [(Kind.THOUGHTS, "", "", choice.reasoning), (Kind.TEXT, "", "", choice.text)]
    found = [each for each in found if each[-1]]
    found += [(Kind.CALL, call.id, call.name, call.arguments) for call in choice.calls]
    blocks = [Block(kind, i, call_id, name, text) for i, (kind, call_id, name, text) in enumerate(found)]
    if blocks:
        blocks[-1].is_cut = choice.finish_reason == FinishReason.LENGTH
    return blocks
