"""`/v1/completions`."""

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from toppings.server.bodies import JsonRoute
from toppings.server.errors import ApiError
from toppings.server.jobs import Choice, Job, beside_loop, room_for_output, tokens_of
from toppings.server.protocol import CompletionBody
from toppings.server.replies import answer, namer, parts, raw_list, running_usage, usage
from toppings.server.state import Lease, ServerState, state_of
from toppings.server.streams import DONE, openai_error_event, sse
from toppings.server.structures import checked_structure
from toppings.text import TextLogprob, TextModel, TextOutput

router = APIRouter(route_class=JsonRoute)

DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions")
async def create_completion(body: CompletionBody, request: Request) -> Response:
    state, prompts = state_of(request), body.prompts()
    lease = state.lease(len(prompts) * body.num_choices)
    job = await lease.during(_job(state, body, prompts))
    reply = CompletionReply(job, body, await lease.during(_echoes(state, body, prompts)))
    return await answer(request, job, lease, reply, is_stream=bool(body.stream))


async def _job(state: ServerState, body: CompletionBody, given: list[str | list[int]]) -> Job:
    started_at = time.perf_counter()
    target = await state.find_target(body.model)
    prompts = await tokens_of(state, given, add_special_tokens=body.add_special_tokens is not False)
    max_tokens = body.max_tokens
    if max_tokens is None:
        default = min(DEFAULT_MAX_TOKENS, state.defaults.get("max_tokens", DEFAULT_MAX_TOKENS))
        max_tokens = min(default, room_for_output(state, prompts))
    structure = await checked_structure(state, body.structure())
    return Job(
        state=state,
        target=target,
        prompts=prompts,
        sampling=body.sampling(
            max_tokens=max_tokens, logprobs=body.logprobs, defaults=state.defaults, structure=structure
        ),
        num_choices=body.num_choices,
        include_stop=bool(body.include_stop_str_in_output),
        cache_salt=body.cache_salt,
        started_at=started_at,
    )


async def _echoes(state: ServerState, body: CompletionBody, prompts: list[str | list[int]]) -> list[str]:
    def decode() -> list[str]:
        return [prompt if isinstance(prompt, str) else state.text.decode(prompt) for prompt in prompts]

    if not body.echo:
        return [""] * len(prompts)
    return await beside_loop(state, sum(map(len, prompts)), decode)


class CompletionReply:
    """The two forms of a completion: whole, or as events."""

    def __init__(self, job: Job, body: CompletionBody, echoes: list[str]) -> None:
        """`echoes` has what precedes the answers to each prompt."""
        self._job = job
        self._body = body
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": job.target.name,
        }
        self._text = job.state.text
        self._echoes = echoes

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        content = [
            self._choice(i, self._echo_of(i) + c.text, c, 0, is_first=True) for i, c in enumerate(choices)
        ]
        num_tokens = sum(len(c.token_ids) for c in choices)
        return {**self._head, "choices": content, "usage": usage(self._job, num_tokens)}

    async def events(self, lease: Lease) -> AsyncGenerator[bytes, None]:
        offsets = [0] * self._job.num_sequences
        echoes: dict[int, str] = {i: self._echo_of(i) for i in range(self._job.num_sequences)}
        num_tokens = 0
        async with aclosing(self._job.stream(lease)) as outputs:
            async for i, output in outputs:
                num_tokens += len(output.token_ids)
                is_first = i in echoes
                text = echoes.pop(i, "") + output.text
                choice = self._choice(i, text, output, offsets[i], is_first=is_first)
                offsets[i] += sum(_num_chars(self._text, each) for each in output.logprobs or [])
                yield sse(
                    {**self._head, "choices": [choice], **running_usage(self._body, self._job, num_tokens)}
                )
        if self._body.include_usage:
            yield sse({**self._head, "choices": [], "usage": usage(self._job, num_tokens)})
        yield DONE

    def error_event(self, error: ApiError) -> bytes:
        return openai_error_event(error)

    def _choice(
        self, index: int, text: str, output: Choice | TextOutput, offset: int, *, is_first: bool
    ) -> dict[str, Any]:
        """`offset` is where the text of its first token begins."""
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = _logprobs(self._text, output.logprobs or [], offset, namer(self._body, self._text))
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._body.return_token_ids:
            prompt = self._job.prompts[index // self._job.num_choices] if is_first else None
            choice |= {"token_ids": output.token_ids, "prompt_token_ids": prompt}
        return choice

    def _echo_of(self, index: int) -> str:
        return self._echoes[index // self._job.num_choices]


def _logprobs(
    text: TextModel, logprobs: list[TextLogprob], offset: int, name: Callable[[int], str]
) -> dict[str, Any]:
    """The completions form; `offset` is where the first token's text begins."""
    offsets = []
    for each in logprobs:
        offsets.append(offset)
        offset += _num_chars(text, each)
    return {
        "tokens": [name(each.token_id) for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": raw_list([_top(name, each) for each in part] for part in parts(logprobs)),
        "text_offset": offsets,
    }


def _num_chars(text: TextModel, each: TextLogprob) -> int:
    """Characters that begin in the token: those of its bytes that do not continue one."""
    return sum(byte & 0xC0 != 0x80 for byte in text.token_bytes(each.token_id))


def _top(name: Callable[[int], str], each: TextLogprob) -> dict[str, float]:
    """The alternatives by name. A name that two tokens share is that of the chosen, else of the likelier."""
    ids = {name(each.token_id): each.token_id}
    top = {}
    for token_id, _, value in each.top:
        is_owner = ids.setdefault(name(token_id), token_id) == token_id
        top[name(token_id) if is_owner else f"token_id:{token_id}"] = value
    return top
