"""Prompts as callers of Python give them: text or token ids, one or many."""

from collections.abc import Mapping, Sequence
from operator import index
from typing import cast

from toppings.bad_input import RequestError, shown
from toppings.sampling_params import SamplingParams

Prompt = str | Sequence[int]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, also where one was given, as text or as token ids. Raises RequestError."""
    if isinstance(prompts, str):
        return [prompts]
    if not is_list(prompts):
        raise _no_prompt(prompts)
    is_single = len(prompts) > 0 and not isinstance(prompts[0], str) and not is_list(prompts[0])
    return cast(list[Prompt], [prompts] if is_single else list(prompts))


def token_ids_of(prompt: Sequence[int]) -> list[int]:
    """As integers of Python's. Raises RequestError for what is no list of integers."""
    try:
        if is_list(prompt) and not any(isinstance(each, bool) for each in prompt):
            return list(map(index, prompt))
    except TypeError:
        pass
    raise _no_prompt(prompt)


def is_list(value: object) -> bool:
    """Arrays and tensors count; bytes, though a sequence of integers, are a text that was not decoded."""
    is_sequence = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    return is_sequence and not isinstance(value, str | bytes | bytearray | memoryview | Mapping)


def _no_prompt(value: object) -> RequestError:
    return RequestError(f"a prompt is {shown(repr(value))}; it must be a text (str) or a list of token ids")


def check_types(sampling: object, adapter: object) -> None:
    if not isinstance(sampling, SamplingParams):
        raise RequestError(f"sampling is {shown(repr(sampling))}; it must be SamplingParams")
    if not isinstance(adapter, str | None):
        raise RequestError(f"adapter is {shown(repr(adapter))}; it must be a name or None")
