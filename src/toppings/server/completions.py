"""`/v1/completions`."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from toppings.server.jobs import Choice, Job, room_for_output, tokens_of
from toppings.server.protocol import CompletionBody
from toppings.server.replies import answer, running_usage, usage
from toppings.server.state import Lease, ServerState, state_of
from toppings.server.streams import DONE, sse
from toppings.text import TextLogprob, TextOutput

router = APIRouter()

DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions")
async def create_completion(body: CompletionBody, request: Request) -> Response:
    job = await _job(state_of(request), body)
    return await answer(request, job, CompletionReply(job, body), is_stream=bool(body.stream))


async def _job(state: ServerState, body: CompletionBody) -> Job:
    started_at = time.perf_counter()
    target = state.target(body.model)
    special = body.add_special_tokens is not False
    prompts = [await tokens_of(state.text, prompt, special) for prompt in body.prompts()]
    max_tokens = body.max_tokens
    if max_tokens is None:
        default = min(DEFAULT_MAX_TOKENS, state.defaults.get("max_tokens", DEFAULT_MAX_TOKENS))
        max_tokens = min(default, room_for_output(state, prompts))
    return Job(
        state=state,
        target=target,
        prompts=prompts,
        sampling=body.sampling(max_tokens=max_tokens, logprobs=body.logprobs, defaults=state.defaults),
        num_choices=body.num_choices,
        include_stop=bool(body.include_stop_str_in_output),
        started_at=started_at,
    )


class CompletionReply:
    """The two forms of a completion: whole, or as events."""

    def __init__(self, job: Job, body: CompletionBody) -> None:
        self._job = job
        self._body = body
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": job.target.name,
        }
        self._echoes = [self._echo(prompt) if body.echo else "" for prompt in body.prompts()]

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        parts = [
            self._choice(i, self._echo_of(i) + c.text, c, _logprobs(c.logprobs, 0))
            for i, c in enumerate(choices)
        ]
        num_tokens = sum(len(c.token_ids) for c in choices)
        return {**self._head, "choices": parts, "usage": usage(self._job.num_prompt_tokens, num_tokens)}

    async def events(self, lease: Lease) -> AsyncGenerator[bytes, None]:
        offsets = [0] * self._job.num_sequences
        echoes: dict[int, str] = {i: self._echo_of(i) for i in range(self._job.num_sequences)}
        num_tokens = 0
        async with aclosing(self._job.stream(lease)) as outputs:
            async for i, output in outputs:
                num_tokens += len(output.token_ids)
                text = echoes.pop(i, "") + output.text
                logprobs = output.logprobs or []
                choice = self._choice(i, text, output, _logprobs(logprobs, offsets[i]))
                offsets[i] += sum(len(each.text) for each in logprobs)
                yield sse(
                    {**self._head, "choices": [choice], **running_usage(self._body, self._job, num_tokens)}
                )
        if self._body.include_usage:
            yield sse({**self._head, "choices": [], "usage": usage(self._job.num_prompt_tokens, num_tokens)})
        yield DONE

    def _choice(
        self, index: int, text: str, ending: Choice | TextOutput, logprobs: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": None if self._body.logprobs is None else logprobs,
            "finish_reason": ending.finish_reason,
            "stop_reason": ending.stop_reason,
        }

    def _echo_of(self, index: int) -> str:
        return self._echoes[index // self._job.num_choices]

    def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._job.state.text.decode(prompt)


def _logprobs(logprobs: list[TextLogprob], offset: int) -> dict[str, Any]:
    """The completions form; `offset` is where the first token's text begins."""
    offsets = []
    for each in logprobs:
        offsets.append(offset)
        offset += len(each.text)
    return {
        "tokens": [each.text for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [{text: value for _, text, value in each.top} for each in logprobs],
        "text_offset": offsets,
    }
