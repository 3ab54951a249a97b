"""How a job's output becomes an answer: whole or as a stream, and what both have in common."""

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from fastapi import Request
from fastapi.responses import Response

from toppings.server.errors import json_response
from toppings.server.jobs import Choice, Job
from toppings.server.protocol import GenerationBody
from toppings.server.state import Lease
from toppings.server.streams import ClientGoneError, EventStream, until_gone

CLIENT_GONE = 499


class Reply(Protocol):
    """The shape of one route's answers."""

    def whole(self, choices: list[Choice]) -> dict[str, Any]: ...
    def events(self, lease: Lease) -> AsyncGenerator[bytes, None]: ...


async def answer(request: Request, job: Job, reply: Reply, *, is_stream: bool) -> Response:
    """Runs the job. Raises ApiError where the queue is full; a client that leaves ends the job at once."""
    lease = job.state.lease(job.num_sequences)
    if is_stream:
        return EventStream(reply.events(lease), lease)
    with lease:
        try:
            choices = await until_gone(request.receive, job.collect(lease))
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
    return json_response(reply.whole(choices))


def usage(num_prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


def running_usage(body: GenerationBody, job: Job, num_tokens: int) -> dict[str, Any]:
    """What an event before the last says of usage: null where a usage event follows, else nothing."""
    if body.continuous_usage:
        return {"usage": usage(job.num_prompt_tokens, num_tokens)}
    return {"usage": None} if body.include_usage else {}
