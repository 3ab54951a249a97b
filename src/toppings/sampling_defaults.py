"""What a base model's `generation_config.json` says of sampling: defaults for what a request leaves out."""

from pathlib import Path
from typing import Any

from toppings.bad_input import RequestError
from toppings.model.files import read_generation_config
from toppings.sampling_params import SamplingParams

FIELDS = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
}
"""The fields that count, as in vLLM; `do_sample` is none of them: greedy is a temperature of 0. LightLLM's
`/generate`, which has that field, asks for it by `read_do_sample`; LoRAX's has defaults of its own."""


def read_sampling_defaults(path: Path) -> dict[str, Any]:
    """By the names of `SamplingParams`; empty where the checkpoint in `path` says nothing.

    Raises ValueError for a value that is none or out of range.
    """
    given = {name: value for name, value in read_generation_config(path).items() if name in FIELDS}
    defaults: dict[str, Any] = {
        name: _number(path, name, value) for name, value in given.items() if value is not None
    }
    if "max_new_tokens" in defaults:
        defaults["max_tokens"] = defaults.pop("max_new_tokens")
    if defaults.get("top_k") == -1:
        defaults["top_k"] = 0
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise ValueError(
            f"{path / 'generation_config.json'}: {error}; set generation_config to none to do without"
        ) from error
    return defaults


def read_do_sample(path: Path) -> bool:
    """Whether the checkpoint in `path` is to be sampled where a request does not say. Raises ValueError."""
    value = read_generation_config(path).get("do_sample")
    if not isinstance(value, bool | None):
        raise ValueError(
            f"{path / 'generation_config.json'}: do_sample is {value!r}; it must be true or false"
        )
    return bool(value)


def _number(path: Path, name: str, value: Any) -> int | float:
    kind = FIELDS[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and value != value // 1):
        raise ValueError(f"{path / 'generation_config.json'}: {name} is {value!r}; it must be a number")
    return int(value) if kind is int else float(value)
