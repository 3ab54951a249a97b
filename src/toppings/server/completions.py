"""`/v1/completions`."""

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from itertools import accumulate
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from toppings.core import Standing
from toppings.detokenizer import TextOutput
from toppings.server.bodies import JsonRoute
from toppings.server.errors import ApiError
from toppings.server.jobs import Choice, Job, beside_loop, num_last_tokens, room_for_output, tokens_of
from toppings.server.protocol import CompletionBody
from toppings.server.replies import answer, namer, parts, prompt_logprobs, raw_list, running_usage, usage
from toppings.server.state import Lease, ServerState, Target, state_of
from toppings.server.streams import DONE, openai_error_event, sse
from toppings.server.structures import checked_structure
from toppings.text import TextLogprob, TextModel

router = APIRouter(route_class=JsonRoute)

DEFAULT_MAX_TOKENS = 16


@router.post("/v1/completions")
async def create_completion(body: CompletionBody, request: Request) -> Response:
    state, prompts = state_of(request), body.prompts()
    num_sequences = len(prompts) * body.num_drawn
    target, lease = await state.admit(num_sequences, lambda: state.find_target(body.model))
    job = await lease.during(_job(state, body, prompts, target, lease.started_at))
    reply = CompletionReply(job, body, await lease.during(_echoes(job, body, prompts)))
    return await answer(request, job, lease, reply, is_stream=bool(body.stream))


async def _job(
    state: ServerState, body: CompletionBody, given: list[str | list[int]], target: Target, started_at: float
) -> Job:
    is_special = body.add_special_tokens is not False
    num_last = num_last_tokens(state, body.truncate_prompt_tokens, body.max_tokens)
    prompts = await tokens_of(state, target, given, add_special_tokens=is_special, num_last=num_last)
    max_tokens = body.max_tokens
    if max_tokens is None:
        default = min(DEFAULT_MAX_TOKENS, state.defaults.get("max_tokens", DEFAULT_MAX_TOKENS))
        max_tokens = min(default, room_for_output(state, prompts))
    structure = await checked_structure(state, target, body.structure())
    return Job(
        state=state,
        target=target,
        prompts=prompts,
        sampling=body.sampling(
            max_tokens=max_tokens,
            logprobs=0 if body.logprobs is None and body.num_drawn > body.num_choices else body.logprobs,
            defaults=state.defaults,
            structure=structure,
            prompt_logprobs=body.num_prompt_logprobs,
        ),
        num_choices=body.num_drawn,
        include_stop=bool(body.include_stop_str_in_output),
        cache_salt=body.cache_salt,
        standing=Standing(priority=body.priority or 0),
        started_at=started_at,
    )


async def _echoes(job: Job, body: CompletionBody, given: list[str | list[int]]) -> list[str]:
    def decode() -> list[str]:
        is_whole = body.truncate_prompt_tokens is None
        return [
            prompt if isinstance(prompt, str) and is_whole else job.text.decode(token_ids)
            for prompt, token_ids in zip(given, job.prompts, strict=True)
        ]

    if not body.echo:
        return [""] * len(given)
    return await beside_loop(job.state, sum(map(len, given)), decode)


def likeliest_choices(choices: list[Choice], num_drawn: int, num_told: int) -> list[Choice]:
    """Of every prompt's `num_drawn` the `num_told` whose tokens are the likeliest on average, best first."""
    if num_drawn == num_told:
        return choices
    groups = [choices[start : start + num_drawn] for start in range(0, len(choices), num_drawn)]
    return [c for group in groups for c in sorted(group, key=_mean_logprob, reverse=True)[:num_told]]


def _mean_logprob(choice: Choice) -> float:
    return sum(each.logprob for each in choice.logprobs) / max(1, len(choice.logprobs))


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
        self._text = job.text
        self._echoes = echoes

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        num_tokens = sum(len(c.token_ids) for c in choices)
        told = likeliest_choices(choices, self._body.num_drawn, self._body.num_choices)
        content = [
            self._choice(i, self._echo_of(i) + c.text, c, 0, is_first=True) for i, c in enumerate(told)
        ]
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
                choice = await self._begun(i, text, output, offsets[i], is_first=is_first)
                offsets[i] += self._num_chars(i, output, is_first=is_first)
                yield sse(
                    {**self._head, "choices": [choice], **running_usage(self._body, self._job, num_tokens)}
                )
        if self._body.include_usage:
            yield sse({**self._head, "choices": [], "usage": usage(self._job, num_tokens)})
        yield DONE

    async def _begun(
        self, index: int, text: str, output: TextOutput, offset: int, *, is_first: bool
    ) -> dict[str, Any]:
        """`_choice`, made beside the event loop where it tells of a prompt."""
        told = output.prompt_logprobs
        return await beside_loop(
            self._job.state,
            0 if told is None else told.num_values,
            lambda: self._choice(index, text, output, offset, is_first=is_first),
        )

    def _num_chars(self, index: int, output: TextOutput, *, is_first: bool) -> int:
        """Of the tokens whose log-probabilities were told with `output`."""
        token_ids = [each.token_id for each in output.logprobs or []]
        if is_first and self._body.echo and self._body.logprobs is not None:
            token_ids = self._prompt_of(index) + token_ids
        return sum(_num_chars(self._text, token_id) for token_id in token_ids)

    def error_event(self, error: ApiError) -> bytes:
        return openai_error_event(error)

    def _choice(
        self, index: int, text: str, output: Choice | TextOutput, offset: int, *, is_first: bool
    ) -> dict[str, Any]:
        """`offset` is where the text of its first token begins."""
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._told(index, output, offset, is_first=is_first),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        prompt = self._prompt_of(index)
        if self._body.return_token_ids:
            given = prompt if is_first else None
            choice |= {"token_ids": output.token_ids, "prompt_token_ids": given}
        if self._body.prompt_logprobs is not None and isinstance(output, Choice):
            choice["prompt_logprobs"] = prompt_logprobs(self._body, self._text, prompt, output)
        return choice

    def _told(
        self, index: int, output: Choice | TextOutput, offset: int, *, is_first: bool
    ) -> dict[str, Any] | None:
        """The log-probabilities of its tokens; with `echo` first those of the prompt's."""
        if not self._body.tells_logprobs:
            return None
        num_top = self._body.logprobs or 0
        logprobs, first = output.logprobs or [], None
        if is_first and self._body.echo and output.prompt_logprobs is not None:
            first, *others = self._prompt_of(index)
            told = [self._text.told(each) for each in output.prompt_logprobs.tokens(others)]
            logprobs = [*(replace(each, top=each.top[:num_top]) for each in told), *logprobs]
        return _logprobs(self._text, first, logprobs, offset, namer(self._body, self._text))

    def _prompt_of(self, index: int) -> list[int]:
        return self._job.prompts[index // self._body.num_choices]

    def _echo_of(self, index: int) -> str:
        return self._echoes[index // self._body.num_choices]


def _logprobs(
    text: TextModel,
    first: int | None,
    logprobs: list[TextLogprob],
    offset: int,
    name: Callable[[int], str],
) -> dict[str, Any]:
    """The completions form; `first`: the first token of a prompt, which none makes likely; `offset` is where
    the first token's text begins."""
    token_ids = [*([] if first is None else [first]), *(each.token_id for each in logprobs)]
    lead: list[None] = [] if first is None else [None]
    tops = ([_top(name, each) for each in part] for part in parts(logprobs))
    return {
        "tokens": [name(token_id) for token_id in token_ids],
        "token_logprobs": [*lead, *(each.logprob for each in logprobs)],
        "top_logprobs": raw_list([lead, *tops]),
        "text_offset": [*accumulate((_num_chars(text, t) for t in token_ids), initial=offset)][:-1],
    }


def _num_chars(text: TextModel, token_id: int) -> int:
    """Characters that begin in the token: those of its bytes that do not continue one."""
    return sum(byte & 0xC0 != 0x80 for byte in text.token_bytes(token_id))


def _top(name: Callable[[int], str], each: TextLogprob) -> dict[str, float]:
    """The alternatives by name. A name that two tokens share is that of the chosen, else of the likelier."""
    ids = {name(each.token_id): each.token_id}
    top = {}
    for token_id, _, value in each.top:
        is_owner = ids.setdefault(name(token_id), token_id) == token_id
        top[name(token_id) if is_owner else f"token_id:{token_id}"] = value
    return top
