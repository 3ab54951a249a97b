"""`/v1/embeddings` as OpenAI has it, and vLLM's `/score`: pooled final hidden states of the base model or an
adapter, of length 1, and the cosines between them."""

import base64
import time
import uuid
from array import array
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from toppings.bad_input import RequestError, shown
from toppings.core import Standing
from toppings.exchanges.exchange import CLIENT_GONE
from toppings.sampling_params import Pooling, SamplingParams
from toppings.server.bodies import JsonRoute
from toppings.server.errors import ApiError, json_response
from toppings.server.fields import Int, LenientBody, Name, Priority, Texts, TokenIds
from toppings.server.jobs import Job, beside_loop, num_last_tokens, tokens_of
from toppings.server.replies import raw_list
from toppings.server.state import Lease, ServerState, Target, state_of
from toppings.server.streams import ClientGoneError, until_gone

router = APIRouter(route_class=JsonRoute)


class PooledBody(LenientBody):
    """What both routes have in common. `pooling`: "last" where it is left out."""

    harmless: ClassVar[frozenset[str]] = frozenset({"user", "metadata", "request_id"})
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **{"normalize": (True,), "use_activation": (True,), "activation": (True,)},
        **{"embed_dtype": ("float32",), "endianness": ("native",), "mm_processor_kwargs": ({},)},
    }

    model: Name | None = None
    pooling: Literal["last", "mean"] | None = None
    truncate_prompt_tokens: Int | None = None
    add_special_tokens: bool | None = None
    priority: Priority | None = None


class EmbeddingBody(PooledBody):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **PooledBody.neutral,
        **{"messages": (), "chat_template": (), "chat_template_kwargs": ({},), "input_type": ()},
    }

    input: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int | None = None

    def inputs(self) -> list[str | list[int]]:
        """Raises RequestError where there is none."""
        if isinstance(self.input, str):
            return [self.input]
        if not self.input:
            raise RequestError("input is an empty list; give at least one text or token id")
        return [self.input] if isinstance(self.input[0], int) else list(self.input)


class ScoreBody(PooledBody):
    text_1: str | Texts
    text_2: str | Texts

    def pairs(self) -> tuple[list[str], list[str]]:
        """As many of the first as of the second. Raises ApiError where they do not pair."""
        first, second = (
            [each] if isinstance(each, str) else list(each) for each in (self.text_1, self.text_2)
        )
        if not first or not second:
            raise ApiError(400, "text_1 and text_2 need at least one text each", param="text_1")
        if len(first) not in (1, len(second)):
            message = (
                f"text_1 holds {len(first)} texts and text_2 {len(second)}; text_1 needs one, or as many"
            )
            raise ApiError(400, message, param="text_1")
        return first * len(second) if len(first) == 1 else first, second


@router.post("/v1/embeddings")
async def create_embeddings(body: EmbeddingBody, request: Request) -> Response:
    """One embedding for each input."""
    state, given = state_of(request), body.inputs()
    size = state.client.info.hidden_size
    if body.dimensions not in (None, size):
        message = (
            f"dimensions is {shown(body.dimensions)}; this model's embeddings have {size}, all of them needed"
        )
        raise ApiError(400, message, param="dimensions")
    job, lease = await _admitted(state, body, given)
    vectors = await _vectors(request, job, lease)
    if vectors is None:
        return Response(status_code=CLIENT_GONE)
    encode = _base64 if body.encoding_format == "base64" else _floats
    found = vectors

    def content() -> Response:
        data = raw_list(
            [{"object": "embedding", "index": i, "embedding": encode(vector)}]
            for i, vector in enumerate(found)
        )
        return json_response(_answer("embd", job, data))

    return await beside_loop(state, size * len(found), content)


@router.post("/score")
@router.post("/v1/score")
async def create_scores(body: ScoreBody, request: Request) -> Response:
    """The cosine of each pair's embeddings. A text that is paired several times is read once."""
    state, (first, second) = state_of(request), body.pairs()
    texts = list(dict.fromkeys([*first, *second]))
    job, lease = await _admitted(state, body, list(texts))
    vectors = await _vectors(request, job, lease)
    if vectors is None:
        return Response(status_code=CLIENT_GONE)
    rows = {text: np.frombuffer(vector, np.float32) for text, vector in zip(texts, vectors, strict=True)}

    def content() -> Response:
        cosines = [float(rows[a] @ rows[b]) for a, b in zip(first, second, strict=True)]
        data = [{"index": i, "object": "score", "score": cosine} for i, cosine in enumerate(cosines)]
        return json_response(_answer("score", job, data))

    return await beside_loop(state, len(second) * state.client.info.hidden_size, content)


async def _admitted(state: ServerState, body: PooledBody, given: list[str | list[int]]) -> tuple[Job, Lease]:
    target, lease = await state.admit(len(given), lambda: state.find_target(body.model))
    return await lease.during(_job(state, body, given, target, lease.started_at)), lease


async def _job(
    state: ServerState, body: PooledBody, given: list[str | list[int]], target: Target, started_at: float
) -> Job:
    is_special = body.add_special_tokens is not False
    num_last = num_last_tokens(state, body.truncate_prompt_tokens, 0)
    prompts = await tokens_of(state, target, given, add_special_tokens=is_special, num_last=num_last)
    sampling = SamplingParams(max_tokens=0, pooling=Pooling(body.pooling or "last"))
    return Job(
        state=state,
        target=target,
        prompts=prompts,
        sampling=sampling,
        standing=Standing(priority=body.priority or 0),
        started_at=started_at,
    )


async def _vectors(request: Request, job: Job, lease: Lease) -> list[bytes] | None:
    """fp32 each, in the machine's order of bytes; None where the client has gone."""
    with lease:
        try:
            choices = await until_gone(request.receive, job.collect(lease))
        except ClientGoneError:
            return None
    return [choice.embedding or b"" for choice in choices]


def _answer(kind: str, job: Job, data: list[dict[str, Any]] | msgspec.Raw) -> dict[str, Any]:
    num_tokens = job.num_prompt_tokens
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": job.target.name,
        "data": data,
        "usage": {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens},
    }


def _floats(vector: bytes) -> list[float]:
    numbers: list[float] = array("f", vector).tolist()
    return numbers


def _base64(vector: bytes) -> str:
    """Clients read little-endian numbers, which those of the machines that we run on are."""
    return base64.b64encode(vector).decode()
