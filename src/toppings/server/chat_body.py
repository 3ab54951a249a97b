"""The body of a chat completion: messages, tools, and what the chat template is told."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from toppings.bad_input import shown
from toppings.server.bodies import parse
from toppings.server.errors import ApiError
from toppings.server.fields import Int, LenientBody, Name
from toppings.server.protocol import GenerationBody
from toppings.tools.formats import Tool

MAX_TOOLS = 1024
MAX_KWARGS = 64
RESERVED_KWARGS = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("chat_template", "tokenize", "return_dict"),
    }
)
"""What a template is told by other fields of the request, or by nobody."""
EFFORTS = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

FunctionName = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """One of several that a field may be: what is unknown to one may be another's."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(LenientBody):
    type: Literal["text"]
    text: str


class CalledFunction(LenientBody):
    name: FunctionName
    arguments: str

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments as JSON themselves, so they take an object; a text that is none, or
        one that is larger than a body may be, is left as it is."""
        try:
            arguments = parse(self.arguments.encode() or b"{}")
        except ApiError:
            arguments = None
        return {
            "name": self.name,
            "arguments": arguments if isinstance(arguments, dict) else self.arguments,
        }


class ToolCall(LenientBody):
    harmless: ClassVar[frozenset[str]] = frozenset({"index"})
    """Of pieces of streamed answers, put together by clients that send it back."""

    id: Name = ""
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        return {"id": self.id, "type": self.type, "function": self.function.for_template()}


class Message(LenientBody):
    harmless: ClassVar[frozenset[str]] = frozenset({"refusal", "annotations"})
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"function_call": (), "audio": ()}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: Name | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _check_role(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content is needed; only that of an assistant may be null, not of {self.role}")
        for field, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, field) and self.role != role:
                raise ValueError(f"{field} belongs to a message of role {role}, not of {self.role}")
        return self

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or [])

    def for_template(self) -> dict[str, Any]:
        """Templates know `system`, not its newer name `developer`, and thoughts as `reasoning_content`."""
        thoughts = self.reasoning_content if self.reasoning is None else self.reasoning
        others = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": [call.for_template() for call in self.tool_calls or []] or None,
            "reasoning_content": thoughts,
        }
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text,
            **{name: value for name, value in others.items() if value is not None},
        }


class FunctionDefinition(LenientBody):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(LenientBody):
    type: Literal["function"]
    function: FunctionDefinition

    def as_tool(self) -> Tool:
        return Tool(
            self.function.name,
            self.function.parameters,
            self.function.description,
            is_strict=bool(self.function.strict),
        )


class FunctionReference(Strict):
    name: FunctionName


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionReference


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True)]


class AllowedChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatBody(GenerationBody):
    """Also what other dialects of chats are put into, so that one path answers them all."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: EFFORTS | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Annotated[list[dict[str, str]], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _check_limits(self) -> "ChatBody":
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs true", param="top_logprobs")
        self._check_kwargs(self.chat_template_kwargs or {})
        self._check_tools()
        return self

    @property
    def tells_logprobs(self) -> bool:
        return bool(self.logprobs) or super().tells_logprobs

    @staticmethod
    def _check_kwargs(kwargs: dict[str, Any]) -> None:
        if len(kwargs) > MAX_KWARGS:
            message = f"chat_template_kwargs holds {len(kwargs)} values; at most {MAX_KWARGS} are allowed"
            raise ApiError(400, message, param="chat_template_kwargs")
        for name in kwargs:
            if name in RESERVED_KWARGS or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name):
                reason = (
                    "is a field of the request" if name in RESERVED_KWARGS else "is no name of a variable"
                )
                message = f"chat_template_kwargs holds {shown(name)!r}, which {reason}; leave it out there"
                raise ApiError(400, message, param="chat_template_kwargs")

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ApiError(400, f"tools holds {shown(twice)!r} twice; names must differ", param="tools")
        wanted = self._wanted_names()
        if isinstance(self.tool_choice, AllowedChoice) and not wanted:
            message = 'tool_choice allows no tools: its list is empty; name some, or give "none"'
            raise ApiError(400, message, param="tool_choice")
        if not names and (wanted or self.must_call):
            raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
        for name in wanted:
            if name not in names:
                message = (
                    f"tool_choice names {shown(name)!r}, which is none of tools: {shown(', '.join(names))}"
                )
                raise ApiError(400, message, param="tool_choice")

    def _wanted_names(self) -> list[str]:
        if isinstance(self.tool_choice, NamedTool):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedChoice):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return []

    @property
    def must_call(self) -> bool:
        """True where the answer has to be a call."""
        if isinstance(self.tool_choice, AllowedChoice):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def is_single_call(self) -> bool:
        """True where the answer may hold one call at most."""
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool)

    def usable_tools(self) -> Sequence[Tool]:
        """Those that the model may call, in the order of `tools`."""
        if self.tool_choice == "none":
            return ()
        wanted = self._wanted_names()
        return [t.as_tool() for t in self.tools or [] if not wanted or t.function.name in wanted]


OF_CHATS: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(ChatBody.known(), (False,)),
    **ChatBody.neutral,
    "n": (1,),
    "best_of": (1,),
}
"""Fields of chats, for other dialects: they refuse by name those that they have not."""
