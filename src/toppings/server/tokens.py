"""`/tokenize` and `/detokenize`, as vLLM has them: what a prompt or a chat is to the model, and back.

A text that cannot fit the model's context is refused before it is tokenised, as a request with it would be.
"""

from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from toppings.server.bodies import JsonRoute
from toppings.server.chat_body import MAX_TOOLS, ChatBody, FunctionTool, Message
from toppings.server.chat_job import chat_tokens
from toppings.server.errors import ApiError, json_response
from toppings.server.fields import LenientBody, Name, TokenIds
from toppings.server.jobs import beside_loop, check_token_ids, tokens_of
from toppings.server.state import ServerState, Target, state_of

router = APIRouter(route_class=JsonRoute)

CHAT_FIELDS = (
    *("model", "messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"),
    *("chat_template_kwargs", "add_special_tokens"),
)


class TokenizeBody(LenientBody):
    """Either `prompt`, with special tokens unless `add_special_tokens` is false, or `messages`, as the chat
    template writes them, without unless it is true."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"mm_processor_kwargs": ({},)}

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            given = "neither is there" if self.prompt is None else "both are there"
            raise ApiError(400, f"the body needs either prompt or messages; {given}", param="prompt")
        return self


class DetokenizeBody(LenientBody):
    model: Name | None = None
    tokens: TokenIds


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    state = state_of(request)
    target = await state.find_target(body.model)
    if body.prompt is None:
        token_ids = await _chat_tokens(state, body, target)
    else:
        is_special = body.add_special_tokens is not False
        [token_ids] = await tokens_of(state, target, [body.prompt], add_special_tokens=is_special)
    content = {
        "count": len(token_ids),
        "max_model_len": state.client.info.max_model_len,
        "tokens": token_ids,
        "token_strs": state.text_of(target).stored_tokens(token_ids) if body.return_token_strs else None,
    }
    return await beside_loop(state, len(token_ids), lambda: json_response(content))


async def _chat_tokens(state: ServerState, body: TokenizeBody, target: Target) -> list[int]:
    chat = ChatBody(**{name: getattr(body, name) for name in CHAT_FIELDS})
    return await chat_tokens(state, chat, target)


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    state = state_of(request)
    target = await state.find_target(body.model)
    check_token_ids(state, target, "tokens", body.tokens)

    def decode() -> str:
        return state.text_of(target).decode(body.tokens, skip_special_tokens=False)

    text = await beside_loop(state, len(body.tokens), decode)
    return json_response({"prompt": text})
