"""Bodies of the OpenAI routes. `fields.py` says what becomes of fields that none of them has."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from toppings.bad_input import RequestError, shown
from toppings.sampling_params import MAX_BIASES, SamplingParams, Structure
from toppings.server.errors import ApiError
from toppings.server.fields import (
    Count,
    Int,
    LenientBody,
    Name,
    Priority,
    Salt,
    SamplingFields,
    Texts,
    TokenIds,
)
from toppings.server.structures import StructureFields

HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"),
        *("request_id", "guided_decoding_backend"),
    }
)
"""Fields for the caller's own bookkeeping: they change no answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "logits_processors": ([],),
    "guided_whitespace_pattern": (),
    "mm_processor_kwargs": ({},),
    "vllm_xargs": ({},),
    "kv_transfer_params": ({},),
    "lora_path": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "stop_regex": ([],),
    "typical_p": (1,),
    "repeat_penalty": (1,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
}
"""Fields of such APIs that are not supported, with the values (beside null) that ask for nothing."""

NO_TOOLS = {"tools": "tool_choice", "functions": "function_call"}
"""What a request may hold all the same where the field beside it says "none": it asks for no calls."""


class StreamOptions(LenientBody):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None


class GenerationBody(StructureFields, SamplingFields):
    """What completions and chat have in common; null means the default."""

    harmless: ClassVar[frozenset[str]] = HARMLESS
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL

    model: Name | None = None
    max_tokens: Int | None = None
    n: Count | None = None
    best_of: Int | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int | None = None
    add_special_tokens: bool | None = None
    cache_salt: Salt | None = None
    priority: Priority | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    prompt_logprobs: Int | None = None
    truncate_prompt_tokens: Int | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_BIASES)] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Texts | None = None
    logprob_token_ids: TokenIds | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_uncalled_tools(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {n: v for n, v in data.items() if n not in NO_TOOLS or data.get(NO_TOOLS[n]) != "none"}

    @model_validator(mode="after")
    def _check_together(self) -> "GenerationBody":
        self._check_best_of()
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(
                400, "prompt_logprobs is not allowed with stream true; leave one out", param="prompt_logprobs"
            )
        if self.allowed_token_ids == []:
            raise ApiError(
                400,
                "allowed_token_ids is empty, which allows no token; name some, or leave it out",
                param="allowed_token_ids",
            )
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream true", param="stream_options")
        return self

    def _check_best_of(self) -> None:
        if self.best_of not in (None, self.num_choices):
            raise ApiError(
                400, f"best_of is {shown(self.best_of)}; it must equal n, {self.num_choices}", param="best_of"
            )

    @property
    def tells_logprobs(self) -> bool:
        """Of the tokens that are drawn."""
        return bool(self.logprob_token_ids)

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling(
        self,
        *,
        max_tokens: int,
        logprobs: int | None,
        defaults: Mapping[str, Any],
        structure: Structure | None = None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """`defaults`: the model's, for what is left out. Raises RequestError for a value out of range."""
        names = (
            *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
            *("seed", "ignore_eos", "min_tokens"),
        )
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        top_k = defaults.get("top_k", 0) if self.top_k is None else self.top_k
        own = {name: value for name, value in defaults.items() if name in names}
        return SamplingParams(
            max_tokens=max_tokens,
            top_k=0 if top_k == -1 else top_k,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=0 if self.logprob_token_ids and logprobs is None else logprobs,
            logprob_token_ids=tuple(self.logprob_token_ids or ()),
            prompt_logprobs=self.prompt_logprobs if prompt_logprobs is None else prompt_logprobs,
            structure=structure,
            logit_bias=self._biases(),
            allowed_token_ids=tuple(self.allowed_token_ids or ()),
            bad_words=tuple(self.bad_words or ()),
            **{**own, **given},
        )

    def _biases(self) -> tuple[tuple[int, float], ...]:
        """Raises RequestError for a key that is no token id."""
        biases = self.logit_bias or {}
        for key in biases:
            if not TOKEN_ID.fullmatch(key):
                raise RequestError(f"logit_bias has the key {shown(repr(key))}; its keys are token ids")
        return tuple((int(key), bias) for key, bias in biases.items())


TOKEN_ID = re.compile("[0-9]{1,10}")
MAX_BEST_OF = 20


class CompletionBody(GenerationBody):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **NEUTRAL,
        "messages": (),
        "max_completion_tokens": (),
        "top_logprobs": (),
        "add_generation_prompt": (),
        "continue_final_message": (False,),
        "include_reasoning": (True, False),
    }

    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)]
    logprobs: Int | None = None
    echo: bool | None = None

    def _check_best_of(self) -> None:
        if self.best_of is None or self.best_of == self.num_choices:
            return
        if self.stream or not self.num_choices < self.best_of <= MAX_BEST_OF:
            bounds = f"at least n, {self.num_choices}, and at most {MAX_BEST_OF}"
            reason = f"n, {self.num_choices}, in a stream" if self.stream else bounds
            raise ApiError(400, f"best_of is {shown(self.best_of)}; it must be {reason}", param="best_of")

    @property
    def tells_logprobs(self) -> bool:
        return self.logprobs is not None or super().tells_logprobs

    @property
    def num_drawn(self) -> int:
        """Choices that are made, of which the likeliest `num_choices` are told."""
        return max(self.best_of or 0, self.num_choices)

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives that the engine is asked for beside each token of the prompt."""
        wanted = [self.prompt_logprobs]
        if self.echo and (self.logprobs is not None or self.max_tokens == 0):
            wanted.append(self.logprobs or 0)
        return max((each for each in wanted if each is not None), default=None)

    def prompts(self) -> list[str | list[int]]:
        """Raises RequestError where there is none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise RequestError("prompt is an empty list; give at least one prompt or token id")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
