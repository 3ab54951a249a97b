"""LoRAX's `/generate`: the adapter is `parameters.adapter_id`, a registered name; none is the base model.

Defaults are the protocol's own, as in LoRAX and TGI: greedy unless a request asks for something else,
whatever the model's `generation_config.json` says of sampling.
"""

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, ClassVar, Literal

import msgspec
from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from toppings.core import FinishReason, Standing
from toppings.exchanges.exchange import CLIENT_GONE
from toppings.sampling_params import SamplingParams, Structure, StructureKind
from toppings.server.errors import ApiError, describe, json_response
from toppings.server.fields import Int, LenientBody, Name, Priority, Texts, Token
from toppings.server.jobs import Choice, Job, tokens_of
from toppings.server.lorax_merges import MergedAdapters, find_merged
from toppings.server.state import Lease, ServerState, Target, state_of
from toppings.server.streams import ClientGoneError, EventStream, until_gone
from toppings.server.structures import Schema, checked_structure, named_structure, schema_text
from toppings.sources.adapters import DIR, KINDS, kind_of
from toppings.text import TextLogprob

BASE_MODEL = "__base_model__"
SOURCES = {"local": DIR, **{kind: kind for kind in KINDS}}
"""Kinds of our sources by LoRAX's names; a registered adapter is found whatever is named."""
DEFAULT_MAX_TOKENS = 20
ERROR_STATUS = {400: (422, "validation"), 429: (429, "overloaded"), 404: (424, "generation")}
"""Their statuses for ours; the rest is told as it is."""


class Grammar(BaseModel):
    """TGI's: a JSON Schema, or a pattern. `json_object` and `json_schema` are other words for `json`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["json", "json_object", "json_schema", "regex"]
    value: Schema | str


class Format(BaseModel):
    """LoRAX's own; without a schema any object."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    type: Literal["json_object", "json_schema"]
    schema_: Schema | None = Field(default=None, alias="schema")


class Parameters(LenientBody):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "top_n_tokens": (0,),
        "max_tokens": (),
        "adapter_parameters": (),
    }

    adapter_id: Name | None = None
    adapter_source: Name | None = None
    api_token: Token | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_k: Int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    max_new_tokens: Int | None = None
    ignore_eos_token: bool = False
    return_full_text: bool | None = None
    stop: Texts = []  # noqa: RUF012  (pydantic copies it)
    seed: Int | None = None
    details: bool = False
    return_k_alternatives: Int | None = None
    grammar: Grammar | None = None
    response_format: Format | None = None
    priority: Priority | None = None
    # Accepted only where they ask for nothing:
    best_of: Int | None = None
    truncate: Int | None = None
    typical_p: float | None = None
    watermark: bool = False
    decoder_input_details: bool = False
    merged_adapters: MergedAdapters | None = None
    apply_chat_template: bool = False

    def check(self) -> None:
        """Raises ApiError for what cannot be done."""
        if self.adapter_source not in (None, *SOURCES):
            raise ApiError(
                400, f"adapter_source is {self.adapter_source!r}; it must be one of {', '.join(SOURCES)}"
            )
        if self.best_of not in (None, 1):
            raise ApiError(400, f"best_of is {self.best_of}; only 1 is supported")
        for name in ("truncate", "typical_p"):
            if getattr(self, name) is not None:
                raise ApiError(400, f"{name} is not supported; leave it out")
        for name in ("watermark", "decoder_input_details", "apply_chat_template"):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported; leave it out")

    @property
    def is_sampled(self) -> bool:
        """TGI samples when told to, or when a sampling field is given."""
        return self.do_sample or any(v is not None for v in (self.temperature, self.top_k, self.top_p))

    def structure(self) -> tuple[str, Structure] | None:
        """The field that was given, and what it means. Raises ApiError where that is nothing."""
        grammar, form = self.grammar, self.response_format
        if grammar is not None and form is not None:
            raise ApiError(
                400,
                "grammar and response_format were given together; an output has one form, give one of them",
            )
        if grammar is not None:
            if grammar.type != "regex":
                return named_structure("grammar", StructureKind.JSON_SCHEMA, schema_text(grammar.value))
            if not isinstance(grammar.value, str):
                raise ApiError(400, "grammar.value is no string; of type regex it must be a pattern")
            return named_structure("grammar", StructureKind.REGEX, grammar.value)
        if form is None:
            return None
        schema = {"type": "object"} if form.schema_ is None else form.schema_
        return named_structure("response_format", StructureKind.JSON_SCHEMA, schema_text(schema))

    def sampling(self, *, has_logprobs: bool, structure: Structure | None) -> SamplingParams:
        """Raises RequestError for a value out of range."""
        names = ("repetition_penalty", "frequency_penalty", "presence_penalty", "top_p", "top_k", "seed")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        temperature = 1.0 if self.temperature is None else self.temperature
        alternatives = self.return_k_alternatives
        return SamplingParams(
            max_tokens=DEFAULT_MAX_TOKENS if self.max_new_tokens is None else self.max_new_tokens,
            temperature=temperature if self.is_sampled else 0.0,
            ignore_eos=self.ignore_eos_token,
            stop=tuple(self.stop),
            logprobs=(alternatives or 0) if has_logprobs else None,
            structure=structure,
            **given,
        )


class Body(LenientBody):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = dict.fromkeys(Parameters.known(), ())
    """They belong into `parameters`."""

    inputs: str
    parameters: Parameters = Parameters()
    stream: bool = False


async def generate(request: Request, raw: dict[str, Any], *, is_stream: bool) -> Response:
    state, body = state_of(request), Body.model_validate(raw)
    is_stream = is_stream or body.stream
    parameters = body.parameters
    parameters.check()
    target, lease = await state.admit(1, lambda: _target(state, parameters))
    has_logprobs = parameters.details or is_stream
    job = await lease.during(_job(state, body, target, lease, has_logprobs=has_logprobs))
    if is_stream:
        return EventStream(
            _events(job, body, lease),
            lease,
            error_event=_error_event,
            error_response=error_response,
            headers=_first_headers(job),
        )
    with lease:
        try:
            [choice] = await until_gone(request.receive, job.collect(lease))
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
    return json_response(_whole(job, body, choice), headers=_all_headers(job, choice))


async def _target(state: ServerState, parameters: Parameters) -> Target:
    adapter, source = parameters.adapter_id, parameters.adapter_source
    if parameters.merged_adapters is not None:
        if adapter is not None:
            raise ApiError(400, "adapter_id and merged_adapters were given together; give one of them")
        return await find_merged(state, parameters.merged_adapters.to_merge())
    if source not in (None, "local") and (state.resolver is None or not state.resolver.has(SOURCES[source])):
        raise ApiError(400, f"adapter_source is {source!r}; this server has no source of that kind")
    return await state.find_target(
        None if adapter == BASE_MODEL else adapter,
        kind=SOURCES.get(source or ""),
        token=parameters.api_token or None,
    )


async def _job(state: ServerState, body: Body, target: Target, lease: Lease, *, has_logprobs: bool) -> Job:
    parameters = body.parameters
    structure = await checked_structure(state, target, parameters.structure())
    return Job(
        state=state,
        target=target,
        started_at=lease.started_at,
        prompts=await tokens_of(state, target, [body.inputs]),
        sampling=parameters.sampling(has_logprobs=has_logprobs, structure=structure),
        standing=Standing(priority=parameters.priority or 0),
    )


def error_response(error: Exception) -> Response:
    described = describe(error)
    status, kind = _status(described)
    return json_response({"error": described.message, "error_type": kind}, status, headers=described.headers)


def _status(error: ApiError) -> tuple[int, str]:
    return ERROR_STATUS.get(error.status, (error.status, "generation"))


def _whole(job: Job, body: Body, choice: Choice) -> dict[str, Any]:
    content: dict[str, Any] = {"generated_text": _full_text(body, choice)}
    if body.parameters.details:
        content["details"] = _details(job, choice)
    return content


def _full_text(body: Body, choice: Choice) -> str:
    return body.inputs + choice.text if body.parameters.return_full_text else choice.text


async def _events(job: Job, body: Body, lease: Lease) -> AsyncGenerator[bytes, None]:
    whole = Choice()
    async with aclosing(job.stream(lease)) as outputs:
        async for _, output in outputs:
            whole.add(output)
            logprobs = output.logprobs or []
            for i, each in enumerate(logprobs):
                is_last = output.finish_reason is not None and i == len(logprobs) - 1
                yield _event(
                    {
                        "token": {**_token(each), "text": output.text if i == len(logprobs) - 1 else ""},
                        "generated_text": _full_text(body, whole) if is_last else None,
                        "details": _details(job, whole) if is_last and body.parameters.details else None,
                    }
                )


def _details(job: Job, choice: Choice) -> dict[str, Any]:
    return {
        "finish_reason": _finish_reason(choice),
        "prompt_tokens": job.num_prompt_tokens,
        "generated_tokens": len(choice.token_ids),
        "skipped_tokens": 0,
        "seed": job.sampling.seed,
        "prefill": [],
        "tokens": [_token(each) for each in choice.logprobs],
    }


def _finish_reason(choice: Choice) -> str:
    if choice.finish_reason == FinishReason.LENGTH:
        return "length"
    return "eos_token" if choice.stop_reason is None else "stop_sequence"


def _token(each: TextLogprob) -> dict[str, Any]:
    token = {"id": each.token_id, "text": each.text, "logprob": each.logprob, "special": False}
    if each.top:
        token["alternatives"] = [{"id": i, "text": text, "logprob": value} for i, text, value in each.top]
    return token


def _first_headers(job: Job) -> dict[str, str]:
    headers = {"x-model-id": job.state.base_name, "x-prompt-tokens": str(job.num_prompt_tokens)}
    if job.target.adapter_id is not None:
        record = job.state.registry.find_named(job.target.name)
        kind = DIR if record is None else kind_of(record.path)
        headers |= {"x-adapter-id": job.target.name, "x-adapter-source": "local" if kind == DIR else kind}
    return {name: value.encode("ascii", "backslashreplace").decode() for name, value in headers.items()}


def _all_headers(job: Job, choice: Choice) -> dict[str, str]:
    """Times in whole milliseconds."""
    [timer] = job.timers
    total_ms = (time.perf_counter() - timer.started_at) * 1e3
    queue_ms = timer.queue_ms or 0.0
    times = {
        "x-total-time": total_ms,
        "x-queue-time": queue_ms,
        "x-inference-time": total_ms - queue_ms,
        "x-time-to-first-token": ((timer.first_at or 0.0) - timer.started_at) * 1e3,
        "x-generated-tokens": len(choice.token_ids),
    }
    return {**_first_headers(job), **{name: str(round(value)) for name, value in times.items()}}


def _event(content: object) -> bytes:
    return b"data:" + msgspec.json.encode(content) + b"\n\n"


def _error_event(error: ApiError) -> bytes:
    return _event({"error": error.message, "error_type": _status(error)[1]})
