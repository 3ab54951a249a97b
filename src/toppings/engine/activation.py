"""Activated LoRA: where in a prompt an adapter begins to act."""

from collections.abc import Sequence

from toppings.core import Request


def activate(request: Request, invocation: Sequence[int]) -> None:
    """The request's adapter acts from the last `invocation` in its prompt on, as PEFT has it, where that is
    not empty; a prompt without one is the base model's."""
    start = _last_start(request.prompt_token_ids, list(invocation)) if invocation else 0
    if start is None:
        request.adapter_id = None
    else:
        request.adapter_start = start


def _last_start(token_ids: list[int], wanted: list[int]) -> int | None:
    first, num = wanted[0], len(wanted)
    for start in range(len(token_ids) - num, -1, -1):
        if token_ids[start] == first and token_ids[start : start + num] == wanted:
            return start
    return None
