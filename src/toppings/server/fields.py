"""What all bodies of requests have in common: types of their fields, and what becomes of the others.

A field that is known is honoured, or refused by name where it asks for what there is not. One that would
change no answer is dropped. One that nobody knows is ignored and told of, as other servers do, because
clients send their own; `--strict-fields on` refuses it.
"""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from toppings.bad_input import MAX_INT
from toppings.core import MAX_SALT_CHARS
from toppings.server.errors import ApiError
from toppings.server.exchange import current_exchange


def _whole(value: Any) -> Any:
    """5.0 is 5, as JSON knows one kind of number only; 5.5 stays what it is and is refused."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole_items(value: Any) -> Any:
    if isinstance(value, list) and float in set(map(type, value)):
        return [_whole(item) for item in value]
    return value


ItemInt = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Int = Annotated[ItemInt, BeforeValidator(_whole)]
"""What any integer of a body fits; most have narrower bounds, in `SamplingParams`."""
Count = Annotated[int, Field(ge=1, le=MAX_INT), BeforeValidator(_whole)]
Priority = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT), BeforeValidator(_whole)]
Name = Annotated[str, Field(max_length=1024)]
Token = Annotated[str, Field(max_length=1024, pattern="^[!-~]*$")]
"""What may stand in a header."""
Salt = Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)]
PathText = Annotated[str, Field(max_length=4096)]
# A list is refused at its first bad item: one error an item would take a multiple of the body's own size.
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[ItemInt], Field(fail_fast=True), BeforeValidator(_whole_items)]


class LenientBody(BaseModel):
    """An object of a client's: a body, or a part of one.

    `harmless` fields are for the caller's own bookkeeping. `neutral` ones are known and not supported, with
    the values (beside null) that ask for nothing; with any other, ApiError 400.
    """

    model_config = ConfigDict(extra="ignore", strict=True)

    harmless: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _sort_out(cls, data: Any) -> Any:
        known = cls.known()
        if not isinstance(data, dict) or data.keys() <= known:
            return data
        for name, value in data.items():
            if name not in known and name not in cls.harmless:
                cls._check_other(name, value)
        return {name: value for name, value in data.items() if name in known}

    @classmethod
    @cache
    def known(cls) -> frozenset[str]:
        """The fields' names, as bodies have them."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    def _check_other(cls, name: str, value: Any) -> None:
        if name in cls.neutral:
            if value is not None and value not in cls.neutral[name]:
                raise ApiError(400, f"{name} is not supported; leave it out", param=name)
            return
        exchange = current_exchange.get()
        if exchange is None:
            return
        if exchange.is_strict:
            raise ApiError(400, f"{name} is no field that this server knows; leave it out", param=name)
        exchange.ignore(name)


class SamplingFields(LenientBody):
    """How tokens are chosen, in the words that dialects share; null means the default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int | None = None
    stop: str | Texts | None = None
