"""`/v1/responses`: OpenAI's other dialect of a chat. Responses are not stored."""

import time
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
from toppings.server.chat_job import ChatChoice, ChatJob, ChatOutput, admitted_chat
from toppings.server.errors import ApiError
from toppings.server.jobs import Choice
from toppings.server.replies import answer
from toppings.server.responses_body import ResponsesBody
from toppings.server.state import Lease, state_of

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/responses")
async def create_response(body: ResponsesBody, request: Request) -> Response:
    state, chat = state_of(request), body.chat()
    job, lease = await admitted_chat(state, chat)
    return await answer(request, job, lease, ResponseReply(job, body), is_stream=bool(body.stream))


class ResponseReply:
    """The two forms of a response: whole, or as numbered events that begin, extend and end its items."""

    def __init__(self, job: ChatJob, body: ResponsesBody) -> None:
        self._job = job
        self._body = body
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._num_events = 0

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        [choice] = choices
        assert isinstance(choice, ChatChoice)
        items, blocks = Items(self._id), blocks_of(choice)
        usage = self._usage(len(choice.token_ids))
        return self._response([items.whole(block) for block in blocks], choice.finish_reason, usage)

    async def events(self, lease: Lease) -> AsyncGenerator[bytes, None]:
        blocks, num_tokens, items = Blocks(), 0, Items(self._id)
        output: ChatOutput | None = None
        async with aclosing(self._job.chats(lease)) as outputs:
            async for _, output in outputs:
                if not self._num_events:
                    begun = self._response([], None, None)
                    yield self._event("response.created", response=begun)
                    yield self._event("response.in_progress", response=begun)
                num_tokens += len(output.token_ids)
                for step, block, text in blocks.push(output):
                    for kind, fields in items.events(step, block, text):
                        yield self._event(kind, **fields)
        assert output is not None
        done = [items.whole(block) for block in blocks.done]
        usage = self._usage(num_tokens)
        response = self._response(done, output.finish_reason, usage)
        yield self._event(f"response.{response['status']}", response=response)

    def error_event(self, error: ApiError) -> bytes:
        """The fields of the error stand beside its kind and, where clients of today look, in `error`."""
        told = error.body()["error"]
        code = str(told["code"])
        return self._event("error", code=code, message=told["message"], param=told["param"], error=told)

    def _event(self, kind: str, **fields: object) -> bytes:
        content = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return f"event: {kind}\ndata: ".encode() + msgspec.json.encode(content) + b"\n\n"

    def _response(
        self, output: list[dict[str, Any]], finish_reason: str | None, usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        """`usage` is None while it goes on."""
        is_cut = finish_reason == FinishReason.LENGTH
        status = "in_progress" if usage is None else "incomplete" if is_cut else "completed"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self._job.target.name,
            "output": output,
            "usage": usage,
            **self._asked(),
        }

    def _asked(self) -> dict[str, Any]:
        """The settings that count, as the answer repeats them."""
        body, sampling = self._body, self._job.sampling
        text = None if body.text is None else body.text.format
        effort = None if body.reasoning is None else body.reasoning.effort
        return {
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": effort, "summary": None},
            "background": False,
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": text or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in body.tools or []],
            "top_p": sampling.top_p,
            "truncation": "disabled",
        }

    def _usage(self, num_tokens: int) -> dict[str, Any]:
        num_prompt_tokens, num_thoughts = self._job.num_prompt_tokens, self._job.num_thoughts(num_tokens)
        return {
            "input_tokens": num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": self._job.num_cached_tokens},
            "output_tokens": num_tokens,
            "output_tokens_details": {"reasoning_tokens": num_thoughts},
            "total_tokens": num_prompt_tokens + num_tokens,
        }


NAMES = {
    Kind.TEXT: ("msg", "output_text", "text"),
    Kind.THOUGHTS: ("rs", "reasoning_text", "text"),
    Kind.CALL: ("fc", "function_call_arguments", "arguments"),
}
"""How an item's id begins, what its events are called, and the field of the last one that holds its text."""


class Items:
    """What blocks are called here: items of a response."""

    def __init__(self, response_id: str) -> None:
        self._suffix = response_id.removeprefix("resp_")

    def whole(self, block: Block, status: str | None = None) -> dict[str, Any]:
        status = status or ("incomplete" if block.is_cut else "completed")
        item = {"id": self._id(block)}
        if block.kind is Kind.TEXT:
            return {
                **item,
                "type": "message",
                "role": "assistant",
                "status": status,
                "content": [_part(block, block.text)],
            }
        if block.kind is Kind.THOUGHTS:
            return {
                **item,
                "type": "reasoning",
                "status": status,
                "summary": [],
                "content": [_part(block, block.text)],
            }
        return {
            **item,
            "type": "function_call",
            "status": status,
            "call_id": block.call_id,
            "name": block.name,
            "arguments": block.text,
        }

    def events(self, step: Step, block: Block, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        place = {"item_id": self._id(block), "output_index": block.index}
        _, event, field = NAMES[block.kind]
        inner = place if block.kind is Kind.CALL else {**place, "content_index": 0}
        extra: dict[str, Any] = {"logprobs": []} if block.kind is Kind.TEXT else {}
        has_parts = block.kind is not Kind.CALL
        if step is Step.BEGUN:
            item = {**self.whole(block, "in_progress"), **({"content": []} if has_parts else {})}
            yield "response.output_item.added", {"output_index": block.index, "item": item}
            if has_parts:
                yield "response.content_part.added", {**inner, "part": _part(block, "")}
        elif step is Step.GROWN:
            yield f"response.{event}.delta", {**inner, "delta": text, **extra}
        else:
            name = {"name": block.name} if block.kind is Kind.CALL else {}
            yield f"response.{event}.done", {**inner, **name, field: block.text, **extra}
            if has_parts:
                yield "response.content_part.done", {**inner, "part": _part(block, block.text)}
            yield (
                "response.output_item.done",
                {"output_index": block.index, "item": self.whole(block)},
            )

    def _id(self, block: Block) -> str:
        return f"{NAMES[block.kind][0]}_{self._suffix}{block.index}"


def _part(block: Block, text: str) -> dict[str, Any]:
    if block.kind is Kind.THOUGHTS:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
