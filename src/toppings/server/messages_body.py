"""The body of `/v1/messages`, Anthropic's, and the chat that it is."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field

from toppings.server.chat_body import MAX_TOOLS, OF_CHATS, ChatBody, FunctionName
from toppings.server.errors import ApiError
from toppings.server.exchange import current_exchange
from toppings.server.fields import Count, Int, LenientBody, Name, Priority, Salt, Texts


class CacheablePart(LenientBody):
    """The prefix cache needs no marks: what is shared is found by its tokens."""

    harmless: ClassVar[frozenset[str]] = frozenset({"cache_control"})


class TextBlock(CacheablePart):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"citations": ([],)}

    type: Literal["text"]
    text: str


class ThinkingBlock(LenientBody):
    harmless: ClassVar[frozenset[str]] = frozenset({"signature"})

    type: Literal["thinking"]
    thinking: str


class ToolUseBlock(CacheablePart):
    type: Literal["tool_use"]
    id: Name
    name: FunctionName
    input: dict[str, Any]


class ToolResultBlock(CacheablePart):
    """One with `is_error` is told to the model as `Error: ` and its content."""

    type: Literal["tool_result"]
    tool_use_id: Name
    content: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    is_error: bool | None = None

    @property
    def text(self) -> str:
        return ("Error: " if self.is_error else "") + _text(self.content)


Blocks = Annotated[
    list[Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Discriminator("type")]],
    Field(fail_fast=True),
]
ALLOWED = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "tool_use")}


class MessageParam(LenientBody):
    role: Literal["user", "assistant"]
    content: str | Blocks

    def for_chat(self, place: str) -> Iterator[dict[str, Any]]:
        """The messages that it is in OpenAI's form: results of tools are messages of their own there.

        Raises ApiError 400 for a block that its role cannot have.
        """
        if isinstance(self.content, str):
            yield {"role": self.role, "content": self.content}
            return
        for i, block in enumerate(self.content):
            if block.type not in ALLOWED[self.role]:
                right = ", ".join(ALLOWED[self.role])
                message = f"{place}.content.{i}: a block of role {self.role} is {right}, not {block.type}"
                raise ApiError(400, message, param=place)
        yield from self._spoken() if self.role == "assistant" else self._asked()

    def _spoken(self) -> Iterator[dict[str, Any]]:
        blocks = [] if isinstance(self.content, str) else self.content
        calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
        thoughts = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
        yield {
            "role": "assistant",
            "content": "".join(block.text for block in blocks if isinstance(block, TextBlock)),
            "tool_calls": [_call(each) for each in calls] or None,
            "reasoning_content": thoughts or None,
        }

    def _asked(self) -> Iterator[dict[str, Any]]:
        said: list[str] = []
        for block in self.content:
            if isinstance(block, ToolResultBlock):
                if said:
                    yield {"role": "user", "content": "".join(said)}
                said = []
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text}
            elif isinstance(block, TextBlock):
                said.append(block.text)
        if said or not self.content:
            yield {"role": "user", "content": "".join(said)}


class ToolParam(CacheablePart):
    """A tool of the client's; those that run at the provider's have another `type`."""

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"defer_loading": (False,)}

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None

    def for_chat(self) -> dict[str, Any]:
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "strict": self.strict,
        }
        return {"type": "function", "function": function}


class ToolChoiceParam(LenientBody):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool | None = None

    def for_chat(self) -> object:
        if self.type == "tool":
            if self.name is None:
                raise ApiError(400, "tool_choice of type tool needs a name", param="tool_choice")
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class ThinkingParam(LenientBody):
    """`budget_tokens` is the most that thoughts are to take. It is not enforced here (`max_tokens` bounds
    thoughts and answer together), and told of as ignored."""

    harmless: ClassVar[frozenset[str]] = frozenset({"display"})

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Int | None = None


class PromptBody(LenientBody):
    """What makes the prompt: counting its tokens needs no more, and drops what is about the answer."""

    harmless: ClassVar[frozenset[str]] = frozenset(
        {
            *("metadata", "service_tier", "inference_geo"),
            *("max_tokens", "stop_sequences", "stream", "temperature", "top_p", "top_k"),
        }
    )
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **OF_CHATS,
        "mcp_servers": ([],),
        "container": (),
        "context_management": (),
        "output_config": ({},),
        "output_format": (),
    }

    model: Name
    messages: Annotated[list[MessageParam], Field(fail_fast=True, min_length=1)]
    system: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    tools: Annotated[list[ToolParam], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingParam | None = None

    def chat(self) -> ChatBody:
        """Raises ApiError 400 for what no chat can be."""
        return ChatBody.model_validate(self._chat_fields())

    def _chat_fields(self) -> dict[str, Any]:
        messages = [] if self.system is None else [{"role": "system", "content": _text(self.system)}]
        for i, message in enumerate(self.messages):
            messages.extend(message.for_chat(f"messages.{i}"))
        last, choice = messages[-1], self.tool_choice
        is_begun = last["role"] == "assistant" and not last.get("tool_calls")
        return {
            "model": self.model,
            "messages": messages,
            "continue_final_message": is_begun or None,
            "tools": [tool.for_chat() for tool in self.tools or []] or None,
            "tool_choice": None if choice is None else choice.for_chat(),
            "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
            **self._thoughts(),
        }

    def _thoughts(self) -> dict[str, Any]:
        """Models that can think are told not to unless they are asked to, as the API has it."""
        thinking = self.thinking
        if thinking is None or thinking.type == "disabled":
            return {"include_reasoning": False, "chat_template_kwargs": {"enable_thinking": False}}
        exchange = current_exchange.get()
        if thinking.budget_tokens is not None and exchange is not None:
            exchange.ignore("thinking.budget_tokens")
        return {"chat_template_kwargs": {"enable_thinking": True}}


class MessagesBody(PromptBody):
    """The sampling fields beyond Anthropic's are those of the other routes."""

    max_tokens: Count
    stop_sequences: Texts | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: Int | None = None
    cache_salt: Salt | None = None
    priority: Priority | None = None

    def _chat_fields(self) -> dict[str, Any]:
        names = (
            *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"),
            *("cache_salt", "priority"),
        )
        own = {name: getattr(self, name) for name in names}
        return {**super()._chat_fields(), **own, "stop": self.stop_sequences}


def _text(content: str | list[TextBlock] | None) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content or [])


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}
