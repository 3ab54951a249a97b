"""Structured outputs of an engine's requests: who waits for a structure to be compiled, and the masks of a
step, made in a thread while the device works."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from toppings.core import Request
from toppings.grammar import StructureError
from toppings.grammar.compiler import Compiler, OwnTokens
from toppings.grammar.guide import Guide
from toppings.ops.token_mask import TokenMask


@dataclass(slots=True)
class StepMasks:
    """By request id: what may be drawn next, or why the output cannot go on."""

    masks: dict[str, TokenMask] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


class Structures:
    """For the engine's thread."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(1, "toppings-masks")
        self._compiling: dict[str, tuple[Request, Future[Any]]] = {}
        self._guides: dict[str, Guide] = {}

    def warm_up(self) -> None:
        """Reads the vocabulary, where no request has asked for that yet."""
        self._compiler.load()

    # --- before a request may run ---

    def begin(self, request: Request, own: OwnTokens | None = None) -> bool:
        """True where it may be scheduled at once; else `pop_compiled` gives it back when it may. `own`: of
        its adapter. Raises StructureError."""
        structure = request.sampling.structure
        if structure is None:
            return True
        compiled = self._compiler.compile(structure, own)
        if compiled.done():
            self._guides[request.request_id] = Guide(compiled.result(), request.vocab_size)
            return True
        self._compiling[request.request_id] = (request, compiled)
        return False

    @property
    def num_compiling(self) -> int:
        return len(self._compiling)

    def pop_compiled(self) -> list[tuple[Request, str | None]]:
        """Requests that may be scheduled now, or the reason why they cannot be served."""
        done = [(request, future) for request, future in self._compiling.values() if future.done()]
        return [(request, self._end_compiling(request, future)) for request, future in done]

    def _end_compiling(self, request: Request, compiled: Future[Any]) -> str | None:
        del self._compiling[request.request_id]
        try:
            self._guides[request.request_id] = Guide(compiled.result(), request.vocab_size)
        except StructureError as error:
            return str(error)
        return None

    def cancel(self, request: Request) -> bool:
        """True where it was waiting here, and is forgotten."""
        return self._compiling.pop(request.request_id, None) is not None

    # --- while it runs ---

    def start_masks(self, outputs: Mapping[str, Sequence[int]]) -> "Future[StepMasks]":
        """`outputs`: by request id, the tokens so far, not changed before the result is there."""
        guides = {name: self._guides[name] for name in outputs}
        return self._thread.submit(_masks, guides, outputs)

    def forget(self, request: Request) -> None:
        self._guides.pop(request.request_id, None)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._compiler.close()


def _masks(guides: Mapping[str, Guide], outputs: Mapping[str, Sequence[int]]) -> StepMasks:
    made = StepMasks()
    for name, guide in guides.items():
        try:
            made.masks[name] = guide.mask(outputs[name])
        except StructureError as error:
            made.failed[name] = str(error)
    return made
