"""`/v1/chat/completions`."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from toppings.server.bodies import JsonRoute
from toppings.server.jobs import Choice, Job, room_for_output, tokens_of
from toppings.server.protocol import ChatBody
from toppings.server.replies import answer, parts, raw_list, running_usage, usage
from toppings.server.state import Lease, ServerState, Target, state_of
from toppings.server.streams import DONE, sse
from toppings.text import TextLogprob, TextModel

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    state = state_of(request)
    lease = state.lease(body.num_choices)
    job = await lease.during(_job(state, body))
    return await answer(request, job, lease, ChatReply(job, body), is_stream=bool(body.stream))


async def _job(state: ServerState, body: ChatBody) -> Job:
    started_at = time.perf_counter()
    target = await state.find_target(body.model)
    prompt = await _tokens(state, body, target)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_tokens is None:
        room = room_for_output(state, [prompt])
        max_tokens = min(room, state.defaults.get("max_tokens", room))
    return Job(
        state=state,
        target=target,
        prompts=[prompt],
        sampling=body.sampling(
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            defaults=state.defaults,
        ),
        num_choices=body.num_choices,
        include_stop=bool(body.include_stop_str_in_output),
        cache_salt=body.cache_salt,
        started_at=started_at,
    )


async def _tokens(state: ServerState, body: ChatBody, target: Target) -> list[int]:
    messages = [message.for_template() for message in body.messages]
    options = {
        "add_generation_prompt": body.add_generation_prompt is not False
        and not (body.add_generation_prompt is None and body.continue_final_message),
        "continue_final_message": bool(body.continue_final_message),
    }
    state.text.check_chars(sum(len(message["content"]) for message in messages))
    text = await state.text.chat_text(messages, await state.template_of(target), **options)
    [tokens] = await tokens_of(state, [text], add_special_tokens=bool(body.add_special_tokens))
    return tokens


class ChatReply:
    """The two forms of a chat completion: whole, or as events whose first one per choice names the role."""

    def __init__(self, job: Job, body: ChatBody) -> None:
        self._job = job
        self._body = body
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        content = [
            {
                "index": i,
                "message": {"role": "assistant", "content": c.text, "refusal": None},
                **self._ending(c.logprobs, c.finish_reason, c.stop_reason),
            }
            for i, c in enumerate(choices)
        ]
        num_tokens = sum(len(c.token_ids) for c in choices)
        total = usage(self._job, num_tokens)
        return {**self._head("chat.completion"), "choices": content, "usage": total}

    async def events(self, lease: Lease) -> AsyncGenerator[bytes, None]:
        head, num_tokens, begun = self._head("chat.completion.chunk"), 0, set()
        async with aclosing(self._job.stream(lease)) as outputs:
            async for i, output in outputs:
                num_tokens += len(output.token_ids)
                if i not in begun:
                    begun.add(i)
                    opening = {"role": "assistant", "content": ""}
                    choice = {"index": i, "delta": opening, "logprobs": None, "finish_reason": None}
                    yield sse({**head, "choices": [choice], **running_usage(self._body, self._job, 0)})
                ending = self._ending(output.logprobs or [], output.finish_reason, output.stop_reason)
                choice = {"index": i, "delta": {"content": output.text}, **ending}
                yield sse({**head, "choices": [choice], **running_usage(self._body, self._job, num_tokens)})
        if self._body.include_usage:
            yield sse({**head, "choices": [], "usage": usage(self._job, num_tokens)})
        yield DONE

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._job.target.name}

    def _ending(
        self, logprobs: list[TextLogprob], finish_reason: str | None, stop_reason: str | int | None
    ) -> dict[str, Any]:
        text = self._job.state.text
        content = None
        if self._body.logprobs:
            content = {
                "content": raw_list([_logprob(text, each) for each in part] for part in parts(logprobs))
            }
        return {"logprobs": content, "finish_reason": finish_reason, "stop_reason": stop_reason}


def _logprob(text: TextModel, each: TextLogprob) -> dict[str, Any]:
    top = [_token(text, token_id, logprob) for token_id, _, logprob in each.top]
    return {**_token(text, each.token_id, each.logprob), "top_logprobs": top}


def _token(text: TextModel, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": text.token_name(token_id),
        "logprob": logprob,
        "bytes": list(text.token_bytes(token_id)),
    }
