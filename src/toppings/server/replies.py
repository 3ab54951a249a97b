"""How a job's output becomes an answer: whole or as a stream, and what both have in common."""

from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response

from toppings.exchanges.exchange import CLIENT_GONE
from toppings.server.errors import ApiError, json_response
from toppings.server.jobs import Choice, Job, beside_loop
from toppings.server.protocol import GenerationBody
from toppings.server.state import Lease
from toppings.server.streams import ClientGoneError, EventStream, until_gone
from toppings.text import TextLogprob, TextModel

T = TypeVar("T")

PART_LEN = 1000


class Reply(Protocol):
    """The shape of one route's answers; `error_event` ends a stream that has begun."""

    def whole(self, choices: list[Choice]) -> dict[str, Any]: ...
    def events(self, lease: Lease) -> AsyncGenerator[bytes, None]: ...
    def error_event(self, error: ApiError) -> bytes: ...


async def answer(request: Request, job: Job, lease: Lease, reply: Reply, *, is_stream: bool) -> Response:
    """Runs the job in its place in the queue; a client that leaves ends the job at once."""
    if is_stream:
        return EventStream(reply.events(lease), lease, error_event=reply.error_event)
    with lease:
        try:
            choices = await until_gone(request.receive, job.collect(lease))
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
    num_values = sum(map(_num_values, choices))
    return await beside_loop(job.state, num_values, lambda: json_response(reply.whole(choices)))


def _num_values(choice: Choice) -> int:
    told = choice.prompt_logprobs
    num_told = sum(1 + len(each.top) for each in choice.logprobs) + (0 if told is None else told.num_values)
    return len(choice.token_ids) + num_told


def prompt_logprobs(body: GenerationBody, text: TextModel, prompt: list[int], choice: Choice) -> Any:
    """vLLM's form: for each token but the first, which has null, itself and the likeliest ones, by id."""
    told = [] if choice.prompt_logprobs is None else choice.prompt_logprobs.tokens(prompt[1:])
    num_top = body.prompt_logprobs or 0
    return raw_list([[None], *([_by_id(text.told(each), num_top) for each in part] for part in parts(told))])


def _by_id(each: TextLogprob, num_top: int) -> dict[str, dict[str, Any]]:
    best = {str(i): (value, rank + 1, name) for rank, (i, name, value) in enumerate(each.top[:num_top])}
    own = {str(each.token_id): (each.logprob, each.rank, each.text)}
    return {
        token_id: {"logprob": value, "rank": rank, "decoded_token": name}
        for token_id, (value, rank, name) in {**own, **best, **own}.items()
    }


def parts(items: list[T]) -> list[list[T]]:
    """`items` in pieces that are quick to write."""
    return [items[start : start + PART_LEN] for start in range(0, len(items), PART_LEN)]


def raw_list(lists: Iterable[list[Any]]) -> msgspec.Raw:
    """One JSON list out of several. Each is written by itself: writing lets no other thread run meanwhile."""
    return msgspec.Raw(b"[" + b",".join(msgspec.json.encode(each)[1:-1] for each in lists if each) + b"]")


def usage(job: Job, num_tokens: int) -> dict[str, Any]:
    """What the job has read, and `num_tokens` that it has generated."""
    return {
        "prompt_tokens": job.num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": job.num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": job.num_cached_tokens},
    }


def namer(body: GenerationBody, text: TextModel) -> Callable[[int], str]:
    """How log-probabilities name tokens: by their texts, or by their ids where texts may be the same."""
    return (lambda token_id: f"token_id:{token_id}") if body.return_tokens_as_token_ids else text.token_name


def running_usage(body: GenerationBody, job: Job, num_tokens: int) -> dict[str, Any]:
    """What an event before the last says of usage: null where a usage event follows, else nothing."""
    if body.continuous_usage:
        return {"usage": usage(job, num_tokens)}
    return {"usage": None} if body.include_usage else {}
