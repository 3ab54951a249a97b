"""What a request's output is held to, in the words of OpenAI's API and of vLLM's."""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from toppings.adapters.vocabulary import own_names
from toppings.bad_input import RequestError
from toppings.sampling_params import Structure, StructureKind
from toppings.server.errors import ApiError
from toppings.server.fields import LenientBody
from toppings.server.state import ServerState, Target
from toppings.tools.grammar import OPTIONS

Choices = Annotated[list[str], Field(fail_fast=True)]
Schema = dict[str, Any] | bool


class JsonSchema(BaseModel):
    """`strict` false ignores the keywords that are not supported; otherwise they are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=1024)]
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's `structured_outputs`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_: Schema | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StructureFields(LenientBody):
    """The fields of a body that may hold its output to something; one of them at most."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    def structure(self) -> tuple[str, Structure] | None:
        """The field that was given, and what it means. Raises ApiError where it means nothing, or two do."""
        outputs = self.structured_outputs or StructuredOutputs()
        schema, is_lenient = self._format_schema()
        wishes = (
            ("response_format", StructureKind.JSON_SCHEMA, _text_of(schema, is_lenient=is_lenient)),
            ("response_format", StructureKind.JSON_OBJECT, self._wants("json_object")),
            ("structured_outputs.json", StructureKind.JSON_SCHEMA, _text_of(outputs.json_)),
            ("structured_outputs.regex", StructureKind.REGEX, outputs.regex),
            ("structured_outputs.choice", StructureKind.CHOICE, _json(outputs.choice)),
            ("structured_outputs.grammar", StructureKind.GRAMMAR, outputs.grammar),
            (
                "structured_outputs.json_object",
                StructureKind.JSON_OBJECT,
                "" if outputs.json_object else None,
            ),
            ("guided_json", StructureKind.JSON_SCHEMA, _text_of(self.guided_json)),
            ("guided_regex", StructureKind.REGEX, self.guided_regex),
            ("guided_choice", StructureKind.CHOICE, _json(self.guided_choice)),
            ("guided_grammar", StructureKind.GRAMMAR, self.guided_grammar),
        )
        given = [(name, kind, text) for name, kind, text in wishes if text is not None]
        if len(given) > 1:
            names = " and ".join(name for name, _, _ in given)
            raise ApiError(
                400, f"{names} were both given; an output has one form, give one", param=given[0][0]
            )
        return named_structure(*given[0]) if given else None

    def _wants(self, kind: str) -> str | None:
        return "" if self.response_format is not None and self.response_format.type == kind else None

    def _format_schema(self) -> tuple[Schema | None, bool]:
        """Raises ApiError where `response_format` has a schema too many or too few."""
        wish = self.response_format
        if wish is None or (wish.type != "json_schema" and wish.json_schema is None):
            return None, False
        if wish.type != "json_schema" or wish.json_schema is None or wish.json_schema.schema_ is None:
            problem = "needs json_schema.schema" if wish.type == "json_schema" else "takes no json_schema"
            raise ApiError(400, f"response_format of type {wish.type} {problem}", param="response_format")
        return wish.json_schema.schema_, wish.json_schema.strict is False


async def checked_structure(
    state: ServerState, target: Target, named: tuple[str, Structure] | None
) -> Structure | None:
    """What the engine is to be given. Raises ApiError with the field's name, SandboxBusyError."""
    if named is None:
        return None
    name, structure = named
    try:
        return await state.checker.checked(structure, *own_names(target.vocabulary))
    except RequestError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from error


def named_structure(name: str, kind: StructureKind, text: str) -> tuple[str, Structure]:
    """With the field that asks for it. Raises ApiError."""
    try:
        return name, Structure(kind, text)
    except RequestError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from error


def _json(value: object) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()


def _text_of(schema: Schema | str | None, *, is_lenient: bool = False) -> str | None:
    return None if schema is None else schema_text(schema, is_lenient=is_lenient)


def schema_text(schema: Schema | str, *, is_lenient: bool = False) -> str:
    """As JSON, which a string holds already. `is_lenient`: what is not supported in it is ignored."""
    if isinstance(schema, str):
        return schema
    if is_lenient and isinstance(schema, dict):
        given = schema.get(OPTIONS)
        schema = {**schema, OPTIONS: {**(given if isinstance(given, dict) else {}), "lenient": True}}
    return msgspec.json.encode(schema).decode()
