"""Answers of Anthropic's routes, of both `/generate`, of vLLM's `/tokenize`."""

from typing import Any, Literal

from pydantic import BaseModel


class MessageErrorDetail(BaseModel):
    type: str
    message: str


class MessageError(BaseModel):
    type: Literal["error"]
    error: MessageErrorDetail
    request_id: str | None = None


class MessageBlock(BaseModel):
    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageUsage(BaseModel):
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int


class MessageObject(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(BaseModel):
    type: str


class TokenCount(BaseModel):
    input_tokens: int


class LoraxError(BaseModel):
    error: str
    error_type: Literal["validation", "generation", "overloaded"]


class LightllmError(BaseModel):
    message: str


class LoraxAnswer(BaseModel):
    generated_text: str
    details: dict[str, Any] | None = None


class LightllmAnswer(BaseModel):
    generated_text: list[str]
    count_output_tokens: int
    tokens: list[dict[str, Any]] | None = None


class GenerateEvent(BaseModel):
    """Of both families; `finished` is LightLLM's."""

    token: dict[str, Any]
    generated_text: str | None
    details: dict[str, Any] | None
    finished: bool | None = None


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(BaseModel):
    prompt: str
