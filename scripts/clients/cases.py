"""What the programs of this folder share: cases that each pass or fail, told as one JSON line."""

import asyncio
import inspect
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel, Field

URL = os.environ["TOPPINGS_URL"]
MODEL = os.environ["TOPPINGS_MODEL"]
KEY = "none"
QUESTION = "What will the weather be like in Rome?"
MAX_ERROR_CHARS = 300


class Weather(BaseModel, extra="forbid"):  # else a weak model may go on inventing fields
    """The weather that is asked for."""

    city: Literal["Rome", "Paris", "Oslo"]
    days: int = Field(ge=1, le=9)
    is_metric: bool


PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Rome", "Paris", "Oslo"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "is_metric": {"type": "boolean"},
    },
    "required": ["city", "days", "is_metric"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather.", "parameters": PARAMETERS},
}

_cases: list[Callable[[], Any]] = []


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    """Passes where it raises nothing; it may be a coroutine function."""
    _cases.append(function)
    return function


def main(*packages: str) -> None:
    outcomes = {}
    for function in _cases:
        try:
            result = function()
            if inspect.isawaitable(result):
                asyncio.run(asyncio.wait_for(_awaited(result), 120))
            outcomes[function.__name__] = "passed"
        except Exception as error:
            outcomes[function.__name__] = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
    print(json.dumps({"packages": {name: version(name) for name in packages}, "cases": outcomes}))


async def _awaited(result: Any) -> Any:
    return await result
