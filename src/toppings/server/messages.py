"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's dialect of a chat."""

import json
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from toppings.core import FinishReason
from toppings.server.blocks import Block, Blocks, Kind, Step, blocks_of
from toppings.server.bodies import JsonRoute
from toppings.server.chat_job import ChatChoice, ChatJob, ChatOutput, admitted_chat, chat_tokens
from toppings.server.errors import ApiError, json_response, message_error
from toppings.server.jobs import Choice
from toppings.server.messages_body import MessagesBody, PromptBody
from toppings.server.replies import answer
from toppings.server.state import Lease, state_of

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/messages")
async def create_message(body: MessagesBody, request: Request) -> Response:
    state, chat = state_of(request), body.chat()
    job, lease = await admitted_chat(state, chat)
    return await answer(request, job, lease, MessageReply(job), is_stream=bool(body.stream))


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: PromptBody, request: Request) -> Response:
    state, chat = state_of(request), body.chat()
    token_ids = await chat_tokens(state, chat, await state.find_target(chat.model))
    return json_response({"input_tokens": len(token_ids)})


class MessageReply:
    """The two forms of a message: whole, or as events that begin, extend and end its blocks."""

    def __init__(self, job: ChatJob) -> None:
        self._job = job
        self._id = f"msg_{uuid.uuid4().hex}"

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        [choice] = choices
        assert isinstance(choice, ChatChoice)
        content = [_whole_block(block) for block in blocks_of(choice)]
        return {**self._head(len(choice.token_ids)), "content": content, **_ending(choice)}

    async def events(self, lease: Lease) -> AsyncGenerator[bytes, None]:
        blocks, num_tokens, ending = Blocks(), 0, None
        async with aclosing(self._job.chats(lease)) as outputs:
            async for _, output in outputs:
                if ending is None:
                    head = {**self._head(0), "content": [], "stop_reason": None, "stop_sequence": None}
                    yield _event("message_start", message=head)
                num_tokens += len(output.token_ids)
                for event in _block_events(blocks, output):
                    yield event
                ending = output
        assert ending is not None
        yield _event("message_delta", delta=_ending(ending), usage={"output_tokens": num_tokens})
        yield _event("message_stop")

    def error_event(self, error: ApiError) -> bytes:
        return _event("error", error=message_error(error))

    def _head(self, num_tokens: int) -> dict[str, Any]:
        num_cached = self._job.num_cached_tokens
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._job.target.name,
            "usage": {
                "input_tokens": self._job.num_prompt_tokens - num_cached,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": num_cached,
                "output_tokens": num_tokens,
            },
        }


def _ending(output: ChatOutput | ChatChoice) -> dict[str, Any]:
    reason, sequence = "end_turn", None
    if output.finish_reason == FinishReason.LENGTH:
        reason = "max_tokens"
    elif output.has_called:
        reason = "tool_use"
    elif isinstance(output.stop_reason, str):
        reason, sequence = "stop_sequence", output.stop_reason
    return {"stop_reason": reason, "stop_sequence": sequence}


def _whole_block(block: Block) -> dict[str, Any]:
    if block.kind is Kind.TEXT:
        return {"type": "text", "text": block.text, "citations": None}
    if block.kind is Kind.THOUGHTS:
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _input(block.text)}


def _input(text: str) -> Any:
    """The arguments of a call that was cut off, or that are no object, are told as they were written."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": text}


def _block_events(blocks: Blocks, output: ChatOutput) -> Iterator[bytes]:
    for step, block, text in blocks.push(output):
        if step is Step.BEGUN:
            yield _event("content_block_start", index=block.index, content_block=_whole_block(block))
        elif step is Step.GROWN:
            yield _event("content_block_delta", index=block.index, delta=_delta(block.kind, text))
        else:
            yield _event("content_block_stop", index=block.index)


def _delta(kind: Kind, text: str) -> dict[str, str]:
    if kind is Kind.TEXT:
        return {"type": "text_delta", "text": text}
    if kind is Kind.THOUGHTS:
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "input_json_delta", "partial_json": text}


def _event(kind: str, **fields: object) -> bytes:
    return f"event: {kind}\ndata: ".encode() + msgspec.json.encode({"type": kind, **fields}) + b"\n\n"
