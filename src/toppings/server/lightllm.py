"""The LightLLM family's `/generate`: selector `lora_id` (a number) or `lora_dir` (a name or a path).

What a request leaves out is the model's `generation_config.json`'s, `do_sample` included, as in LightLLM.
"""

import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, ClassVar

import msgspec
from fastapi import Request
from fastapi.responses import Response

from toppings.adapters.errors import AdapterNotFound
from toppings.core import Standing
from toppings.detokenizer import TextOutput
from toppings.exchanges.exchange import CLIENT_GONE
from toppings.sampling_params import SamplingParams
from toppings.server.errors import ApiError, describe, json_response
from toppings.server.fields import Int, LenientBody, Name, PathText, Priority, Texts
from toppings.server.jobs import Choice, Job, tokens_of
from toppings.server.state import Lease, ServerState, Target, state_of
from toppings.server.streams import ClientGoneError, EventStream, until_gone
from toppings.text import TextLogprob

SAMPLING_FIELDS = (
    *("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "repetition_penalty"),
)


class Parameters(LenientBody):
    harmless: ClassVar[frozenset[str]] = frozenset({"group_request_id", "suggested_dp_index"})
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (1,),
        "n": (1,),
        "max_tokens": (),
        "min_p": (0,),
        "seed": (-1,),
        "min_new_tokens": (0, 1),
        "input_penalty": (False,),
        "skip_special_tokens": (True,),
        "add_special_tokens": (True,),
        "add_spaces_between_special_tokens": (True,),
        "print_eos_token": (False,),
        "exponential_decay_length_penalty": ([1, 1.0],),
        "regular_constraint": (),
        "guided_grammar": (),
        "guided_json": (),
        "allowed_token_ids": ([],),
        "image_max_patch_num": (-1,),
        "move_kv_to_decode_node": (),
    }

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool = False
    max_new_tokens: Int = 16
    stop_sequences: str | Texts | None = None
    return_details: bool = False
    priority: Priority | None = None

    def sampling(self, state: ServerState, *, has_logprobs: bool) -> SamplingParams:
        """Without `do_sample`, greedy. Raises RequestError for a value out of range."""
        stop = self.stop_sequences
        own = {name: value for name, value in state.defaults.items() if name in SAMPLING_FIELDS}
        given = {name: value for name in SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        chosen = {"temperature": 1.0, **own, **given}
        if not (state.is_sampled_by_default if self.do_sample is None else self.do_sample):
            chosen["temperature"] = 0.0
        if chosen.get("top_k") == -1:
            chosen["top_k"] = 0
        return SamplingParams(
            max_tokens=self.max_new_tokens,
            ignore_eos=self.ignore_eos,
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            logprobs=0 if has_logprobs else None,
            **chosen,
        )


class Body(LenientBody):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = dict.fromkeys(Parameters.known(), ())
    """They belong into `parameters`."""

    inputs: str
    parameters: Parameters
    lora_dir: PathText | None = None
    lora_id: Int | None = None
    req_id: Int | Name | None = None


async def generate(request: Request, raw: dict[str, Any], *, is_stream: bool) -> Response:
    state, body = state_of(request), Body.model_validate(raw)
    details = body.parameters.return_details
    target, lease = await state.admit(1, lambda: _target(state, body))
    job = await lease.during(_job(state, body, target, lease, has_logprobs=details or is_stream))
    if is_stream:
        return EventStream(
            _events(job, lease), lease, error_event=_error_event, error_response=error_response
        )
    with lease:
        try:
            [choice] = await until_gone(request.receive, job.collect(lease))
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)
    return json_response(_whole(choice, has_details=details))


async def _job(state: ServerState, body: Body, target: Target, lease: Lease, *, has_logprobs: bool) -> Job:
    return Job(
        state=state,
        target=target,
        started_at=lease.started_at,
        prompts=await tokens_of(state, target, [body.inputs]),
        sampling=body.parameters.sampling(state, has_logprobs=has_logprobs),
        standing=Standing(priority=body.parameters.priority or 0),
    )


def error_response(error: Exception) -> Response:
    described = describe(error)
    return json_response({"message": described.message}, described.status, headers=described.headers)


async def _target(state: ServerState, body: Body) -> Target:
    """`lora_id` is the registry's id; `lora_dir` an adapter's name, or the directory it was loaded from."""
    tenant = state.account.tenant
    if body.lora_id is not None:
        try:
            name = state.registry.get_by_id(body.lora_id).name
        except AdapterNotFound:
            name = None
        if name is None or not tenant.may_see(name):
            raise ApiError(404, f"no adapter has lora_id {body.lora_id}; GET /adapters lists them")
        return await state.find_target(name)
    if body.lora_dir is None:
        return await state.find_target(None)
    record = state.registry.find_from(os.path.normpath(body.lora_dir))
    is_seen = record is not None and tenant.may_see(record.name)
    return await state.find_target(record.name if record is not None and is_seen else body.lora_dir)


def _whole(choice: Choice, *, has_details: bool) -> dict[str, Any]:
    content: dict[str, Any] = {
        "generated_text": [choice.text],
        "count_output_tokens": len(choice.token_ids),
    }
    if has_details:
        content["tokens"] = [_token(each) for each in choice.logprobs]
    return content


async def _events(job: Job, lease: Lease) -> AsyncGenerator[bytes, None]:
    async with aclosing(job.stream(lease)) as outputs:
        async for _, output in outputs:
            for event in _token_events(output):
                yield event


def _token_events(output: TextOutput) -> list[bytes]:
    """One event per token; the text that became whole with them stands in the last one."""
    logprobs, last = output.logprobs or [], len(output.logprobs or []) - 1
    return [
        _event(
            {
                "token": {**_token(each), "text": output.text if i == last else "", "special": False},
                "generated_text": None,
                "finished": i == last and output.finish_reason is not None,
                "details": None,
            }
        )
        for i, each in enumerate(logprobs)
    ]


def _token(each: TextLogprob) -> dict[str, Any]:
    return {"id": each.token_id, "text": each.text, "logprob": each.logprob}


def _event(content: object) -> bytes:
    return b"data:" + msgspec.json.encode(content) + b"\n\n"


def _error_event(error: ApiError) -> bytes:
    return _event({"message": error.message})
