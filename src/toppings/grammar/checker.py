"""Structures of requests, tried in a sandbox before an engine gets them."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from toppings.bad_input import RequestError
from toppings.sampling_params import MAX_STRUCTURE_CHARS, Structure, StructureKind
from toppings.sandbox import Sandbox, SandboxError, SandboxLostError

NUM_PROCESSES = 2
CHECK_CPU_S = 1.0
"""Of a processor. Common schemas take some milliseconds."""
MAX_KEPT = 256
MAX_KEPT_CHARS = 8 * MAX_STRUCTURE_CHARS
LENIENT = "give response_format's strict as false to have what is not supported ignored"


@dataclass(frozen=True, slots=True)
class _Refused:
    reason: str


_Key = tuple[Structure, tuple[str, ...], int]


class StructureChecker:
    """Belongs to one event loop. Grammars may name the model's `special_tokens` as `<name>`, and any token of
    its vocabulary as `<[id]>`."""

    def __init__(self, special_tokens: Sequence[str], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._special_tokens = list(special_tokens)
        self._sandbox = Sandbox(NUM_PROCESSES, work="the check of a structured output")
        self._kept: OrderedDict[_Key, Structure | _Refused] = OrderedDict()
        self._num_chars = 0

    async def checked(
        self, structure: Structure, added_tokens: Sequence[str] = (), vocab_size: int = 0
    ) -> Structure:
        """What the engine is to be given: the structure, or a grammar in GBNF as one in Lark's notation.
        `added_tokens`, `vocab_size`: the special tokens that an adapter has besides, and its vocabulary's
        size, 0 where that is the base model's.

        Raises RequestError where it is not valid, allows no output, or is too complex; SandboxBusyError.
        """
        kept_as = structure, tuple(added_tokens), vocab_size
        if (kept := self._kept.get(kept_as)) is not None:
            self._kept.move_to_end(kept_as)
            return _accepted(kept)
        key = hashlib.sha256(f"{structure.kind}{structure.text}".encode()).hexdigest()
        result: Structure | _Refused
        try:
            text = await self._sandbox.run_in_turn(
                key,
                "check",
                cpu_s=CHECK_CPU_S,
                structure_kind=structure.kind,
                text=structure.text,
                special_tokens=[*self._special_tokens, *added_tokens],
                vocab_size=vocab_size or self._vocab_size,
            )
            result = structure if text == structure.text else replace(structure, text=text)
        except SandboxLostError as error:
            raise RequestError(_refusal(structure, str(error))) from error
        except SandboxError as error:
            result = _Refused(_refusal(structure, str(error)))
        self._keep(kept_as, result)
        return _accepted(result)

    def _keep(self, kept_as: _Key, result: Structure | _Refused) -> None:
        if kept_as in self._kept:
            return
        self._kept[kept_as] = result
        self._num_chars += len(kept_as[0].text)
        while len(self._kept) > MAX_KEPT or self._num_chars > MAX_KEPT_CHARS:
            self._num_chars -= len(self._kept.popitem(last=False)[0][0].text)

    def close(self) -> None:
        """Ends its processes; they also end with this object."""
        self._sandbox.close()


def _accepted(result: Structure | _Refused) -> Structure:
    """Raises RequestError."""
    if isinstance(result, _Refused):
        raise RequestError(result.reason)
    return result


def _refusal(structure: Structure, reason: str) -> str:
    can_be_lenient = structure.kind == StructureKind.JSON_SCHEMA and "Unimplemented" in reason
    reason = f"{reason}; {LENIENT}" if can_be_lenient else reason
    return f"the {structure.kind} cannot be followed: {reason}"
