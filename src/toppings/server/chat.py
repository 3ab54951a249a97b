"""`/v1/chat/completions`."""

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from toppings.core import FinishReason
from toppings.server.bodies import JsonRoute
from toppings.server.chat_body import ChatBody
from toppings.server.chat_job import ChatChoice, ChatJob, ChatOutput, admitted_chat
from toppings.server.errors import ApiError
from toppings.server.jobs import Choice
from toppings.server.replies import answer, namer, parts, prompt_logprobs, raw_list, running_usage, usage
from toppings.server.state import Lease, state_of
from toppings.server.streams import DONE, openai_error_event, sse
from toppings.text import TextLogprob, TextModel
from toppings.tools.output import CallDelta

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    state = state_of(request)
    job, lease = await admitted_chat(state, body)
    return await answer(request, job, lease, ChatReply(job, body), is_stream=bool(body.stream))


class ChatReply:
    """The two forms of a chat completion: whole, or as events whose first one per choice names the role."""

    def __init__(self, job: ChatJob, body: ChatBody) -> None:
        self._job = job
        self._body = body
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        text = self._job.text
        content = [
            {"index": i, "message": _message(c), **self._ending(c.logprobs, c)}
            for i, c in enumerate(cast(list[ChatChoice], choices))
        ]
        num_tokens = sum(len(c.token_ids) for c in choices)
        head = {**self._head("chat.completion"), **self._prompt()}
        if self._body.prompt_logprobs is not None:
            told = prompt_logprobs(self._body, text, self._job.prompts[0], choices[0])
            head["prompt_logprobs"] = told
        return {**head, "choices": content, "usage": self._usage(num_tokens)}

    async def events(self, lease: Lease) -> AsyncGenerator[bytes, None]:
        head, num_tokens, begun = self._head("chat.completion.chunk"), 0, set()
        async with aclosing(self._job.chats(lease)) as outputs:
            async for i, output in outputs:
                num_tokens += len(output.token_ids)
                if i not in begun:
                    begun.add(i)
                    opening = {"role": "assistant", "content": ""}
                    choice = {"index": i, "delta": opening, "logprobs": None, "finish_reason": None}
                    told = {**self._prompt(), "choices": [choice]}
                    yield sse({**head, **told, **running_usage(self._body, self._job, 0)})
                delta = self._delta(output)
                has_tokens = bool(output.logprobs or (self._body.return_token_ids and output.token_ids))
                if not delta and output.finish_reason is None and not has_tokens:
                    continue  # its text is kept back until it is known what it is
                choice = {"index": i, "delta": delta, **self._ending(output.logprobs or [], output)}
                yield sse({**head, "choices": [choice], **running_usage(self._body, self._job, num_tokens)})
        if self._body.include_usage:
            yield sse({**head, "choices": [], "usage": self._usage(num_tokens)})
        yield DONE

    def _usage(self, num_tokens: int) -> dict[str, Any]:
        details = {"reasoning_tokens": self._job.num_thoughts(num_tokens)}
        return {**usage(self._job, num_tokens), "completion_tokens_details": details}

    def error_event(self, error: ApiError) -> bytes:
        return openai_error_event(error)

    def _delta(self, output: ChatOutput) -> dict[str, Any]:
        delta: dict[str, Any] = _thoughts(output.reasoning)
        if output.text or self._job.new_parser is None:
            delta["content"] = output.text
        if output.calls:
            delta["tool_calls"] = [_call_delta(call) for call in output.calls]
        return delta

    def _prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": self._job.prompts[0]} if self._body.return_token_ids else {}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._job.target.name}

    def _ending(self, logprobs: list[TextLogprob], output: ChatChoice | ChatOutput) -> dict[str, Any]:
        text = self._job.text
        name = namer(self._body, text)
        content = None
        if self._body.tells_logprobs:
            content = {
                "content": raw_list([_logprob(text, name, each) for each in part] for part in parts(logprobs))
            }
        finish_reason: str | None = output.finish_reason
        if finish_reason == FinishReason.STOP and output.has_called:
            finish_reason = "tool_calls"
        told = {"logprobs": content, "finish_reason": finish_reason, "stop_reason": output.stop_reason}
        return {**told, "token_ids": output.token_ids} if self._body.return_token_ids else told


def _message(choice: ChatChoice) -> dict[str, Any]:
    """Content is null where there are only calls, or thoughts."""
    is_null = not choice.text and bool(choice.calls or choice.reasoning)
    message = {"role": "assistant", "content": None if is_null else choice.text, "refusal": None}
    calls = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in choice.calls
    ]
    return {**message, **_thoughts(choice.reasoning), **({"tool_calls": calls} if calls else {})}


def _thoughts(text: str) -> dict[str, Any]:
    """Under both names that clients look for."""
    return {"reasoning": text, "reasoning_content": text} if text else {}


def _call_delta(call: CallDelta) -> dict[str, Any]:
    function = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    return {
        "index": call.index,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, **function},
    }


def _logprob(text: TextModel, name: Callable[[int], str], each: TextLogprob) -> dict[str, Any]:
    top = [_token(text, name, token_id, logprob) for token_id, _, logprob in each.top]
    return {**_token(text, name, each.token_id, each.logprob), "top_logprobs": top}


def _token(text: TextModel, name: Callable[[int], str], token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": name(token_id),
        "logprob": logprob,
        "bytes": list(text.token_bytes(token_id)),
    }
