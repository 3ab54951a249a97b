"""The body of `/v1/responses`, and the chat that it is. None is stored: each request brings all of it."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from toppings.server.chat_body import EFFORTS, MAX_TOOLS, OF_CHATS, ChatBody, FunctionName
from toppings.server.errors import ApiError
from toppings.server.exchange import current_exchange
from toppings.server.fields import Count, LenientBody, Name, Priority, Salt, SamplingFields

OwnField = frozenset({"id", "status"})
"""What items of an answer have that say nothing when they are sent back."""


class Part(LenientBody):
    harmless: ClassVar[frozenset[str]] = frozenset({"annotations", "logprobs"})

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str


class Refusal(LenientBody):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


Parts = Annotated[list[Annotated[Part | Refusal, Discriminator("type")]], Field(fail_fast=True)]


class MessageItem(LenientBody):
    harmless: ClassVar[frozenset[str]] = OwnField | {"phase"}

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts


class CallItem(LenientBody):
    harmless: ClassVar[frozenset[str]] = OwnField

    type: Literal["function_call"]
    call_id: Name
    name: FunctionName
    arguments: str


class CallOutputItem(LenientBody):
    harmless: ClassVar[frozenset[str]] = OwnField

    type: Literal["function_call_output"]
    call_id: Name
    output: str | Parts


class ReasoningItem(LenientBody):
    """Its `summary` is told where it has no `content`."""

    harmless: ClassVar[frozenset[str]] = OwnField
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"encrypted_content": ("",)}

    type: Literal["reasoning"]
    summary: Annotated[list[Part], Field(fail_fast=True)] | None = None
    content: Annotated[list[Part], Field(fail_fast=True)] | None = None


def _kind(item: Any) -> str:
    """A message may leave its `type` out."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return kind if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionToolParam(LenientBody):
    """A function of the client's; tools that run at the provider's have another `type`."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"defer_loading": (False,)}

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        return {"type": "function", "function": self.model_dump(exclude={"type"})}


class ReasoningParam(LenientBody):
    """Thoughts are told whole, not summed up; a wish for that is told of as ignored."""

    effort: EFFORTS | None = None
    summary: Name | None = None
    generate_summary: Name | None = None

    def note_ignored(self) -> None:
        exchange = current_exchange.get()
        for name in ("summary", "generate_summary"):
            if exchange is not None and getattr(self, name) is not None:
                exchange.ignore(f"reasoning.{name}")


class TextParam(LenientBody):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: dict[str, Any] | None = None

    def for_chat(self) -> dict[str, Any] | None:
        """As `response_format`, which has what is to a schema in an object of its own."""
        if self.format is None or self.format.get("type") != "json_schema":
            return self.format
        return {
            "type": "json_schema",
            "json_schema": {name: value for name, value in self.format.items() if name != "type"},
        }


class ResponseStreamOptions(LenientBody):
    """Events are never padded."""

    include_obfuscation: bool | None = None


class ResponsesBody(SamplingFields):
    """`store` is taken, and the answer says that it was not done; `include` may name thoughts in cipher,
    which are told, and taken back, in plain. Sampling fields beyond OpenAI's are those of other routes."""

    harmless: ClassVar[frozenset[str]] = frozenset(
        {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier", "store"}
    )
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **OF_CHATS,
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "prompt": (),
        "max_tool_calls": (),
        "truncation": ("disabled",),
        "include": ([], ["reasoning.encrypted_content"]),
        "top_logprobs": (0,),
        "context_management": (),
        "moderation": (),
    }

    model: Name | None = None
    input: str | Annotated[list[Item], Field(fail_fast=True, min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: Annotated[list[FunctionToolParam], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningParam | None = None
    text: TextParam | None = None
    metadata: dict[str, str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: Salt | None = None
    priority: Priority | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> "ResponsesBody":
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream true", param="stream_options")
        return self

    def chat(self) -> ChatBody:
        """Raises ApiError 400 for what no chat can be."""
        if self.reasoning is not None:
            self.reasoning.note_ignored()
        names = (
            *("model", "parallel_tool_calls", "temperature", "top_p", "top_k", "min_p", "seed", "stop"),
            *("presence_penalty", "frequency_penalty", "repetition_penalty"),
            *("chat_template_kwargs", "cache_salt", "priority"),
        )
        fields = {
            "messages": self._messages(),
            "max_tokens": self.max_output_tokens,
            "tools": [tool.for_chat() for tool in self.tools or []] or None,
            "tool_choice": self._tool_choice(),
            "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
            "response_format": None if self.text is None else self.text.for_chat(),
            **{name: getattr(self, name) for name in names},
        }
        return ChatBody.model_validate({name: value for name, value in fields.items() if value is not None})

    def _tool_choice(self) -> object:
        """Functions are named inside an object of their own in a chat."""
        given = self.tool_choice
        if not isinstance(given, dict):
            return given
        if given.get("type") == "function":
            return {"type": "function", "function": {"name": given.get("name")}}
        if given.get("type") == "allowed_tools":
            tools = given.get("tools")
            functions = [_named(each) for each in tools] if isinstance(tools, list) else tools
            return {
                "type": "allowed_tools",
                "allowed_tools": {"mode": given.get("mode"), "tools": functions},
            }
        raise ApiError(
            400, "tool_choice is none, auto, required, a function or allowed_tools", param="tool_choice"
        )

    def _messages(self) -> list[dict[str, Any]]:
        """Thoughts, text and calls of one turn stand in items of their own, and in one message of a chat."""
        messages = [] if self.instructions is None else [_message("system", self.instructions)]
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        turn: dict[str, Any] | None = None
        for item in items:
            is_turn = (
                not isinstance(item, CallOutputItem) and getattr(item, "role", "assistant") == "assistant"
            )
            if not is_turn or (turn is not None and _begins_anew(turn, item)):
                turn = None
            if isinstance(item, CallOutputItem):
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            elif isinstance(item, MessageItem) and not is_turn:
                messages.append(_message(item.role, _text(item.content)))
            else:
                if turn is None:
                    turn = _message("assistant", None)
                    messages.append(turn)
                _add(turn, item)
        return messages


def _begins_anew(turn: dict[str, Any], item: MessageItem | CallItem | CallOutputItem | ReasoningItem) -> bool:
    """Whether an item of the model's is the first of another turn: calls come last in one."""
    return not isinstance(item, CallItem) and (
        "tool_calls" in turn or (isinstance(item, MessageItem) and turn["content"] is not None)
    )


def _add(turn: dict[str, Any], item: MessageItem | CallItem | CallOutputItem | ReasoningItem) -> None:
    if isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)
    elif isinstance(item, ReasoningItem):
        thoughts = [turn.get("reasoning_content"), _text(item.content or item.summary or [])]
        turn["reasoning_content"] = "\n\n".join(filter(None, thoughts))
    elif isinstance(item, MessageItem):
        turn["content"] = _text(item.content)


def _message(role: str, content: str | None) -> dict[str, Any]:
    return {"role": role, "content": content}


def _named(tool: Any) -> Any:
    """A tool as the lists of `allowed_tools` name it."""
    if not isinstance(tool, dict) or "name" not in tool:
        return tool
    return {"type": tool.get("type"), "function": {"name": tool["name"]}}


def _text(content: str | list[Any]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
