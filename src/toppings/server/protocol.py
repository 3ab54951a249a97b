"""Bodies of the OpenAI routes. Every field is honoured or refused by name; none is silently ignored."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from toppings.core import MAX_INT, MAX_SALT_CHARS, RequestError, SamplingParams, shown
from toppings.server.errors import ApiError

HARMLESS = frozenset({"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"})
"""Fields for the caller's own bookkeeping: they change no answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "priority": (0,),
}
"""Fields of such APIs that are not supported, with the values (beside null) that ask for nothing."""

NO_TOOLS = {"tools": "tool_choice", "functions": "function_call"}
"""What a request may hold all the same where the field beside it says "none": it asks for no calls."""

Int = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
"""What any integer of a body fits; most have narrower bounds, in `SamplingParams`."""
Count = Annotated[int, Field(ge=1, le=MAX_INT)]
Name = Annotated[str, Field(max_length=1024)]
Salt = Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)]
PathText = Annotated[str, Field(max_length=4096)]
# A list is refused at its first bad item: one error an item would take a multiple of the body's own size.
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[Int], Field(fail_fast=True)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None


class GenerationBody(BaseModel):
    """What completions and chat have in common; null means the default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Name | None = None
    max_tokens: Int | None = None
    n: Count | None = None
    best_of: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int | None = None
    stop: str | Texts | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int | None = None
    add_special_tokens: bool | None = None
    cache_salt: Salt | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {n: v for n, v in data.items() if n not in NO_TOOLS or data.get(NO_TOOLS[n]) != "none"}
        for name in [n for n in data if n in NEUTRAL and n not in cls.model_fields]:
            if data[name] is not None and data[name] not in NEUTRAL[name]:
                raise ApiError(400, f"{name} is not supported; leave it out", param=name)
        dropped = (HARMLESS | NEUTRAL.keys()) - cls.model_fields.keys()
        return {name: value for name, value in data.items() if name not in dropped}

    @model_validator(mode="after")
    def _check_together(self) -> "GenerationBody":
        if self.best_of not in (None, self.num_choices):
            raise ApiError(
                400, f"best_of is {shown(self.best_of)}; it must equal n, {self.num_choices}", param="best_of"
            )
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream true", param="stream_options")
        return self

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
        self, *, max_tokens: int, logprobs: int | None, defaults: Mapping[str, Any]
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
            logprobs=logprobs,
            **{**own, **given},
        )


class CompletionBody(GenerationBody):
    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)]
    logprobs: Int | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_echo(self) -> "CompletionBody":
        if self.echo and self.logprobs is not None:
            raise ApiError(
                400, "echo together with logprobs is not supported; ask for one of them", param="echo"
            )
        return self

    def prompts(self) -> list[str | list[int]]:
        """Raises RequestError where there is none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise RequestError("prompt is an empty list; give at least one prompt or token id")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        """Answers of this API sent back to it hold fields that say nothing, such as `refusal: null`."""
        if not isinstance(data, dict):
            return data
        return {
            name: value for name, value in data.items() if name in cls.model_fields or value not in (None, [])
        }

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content is needed; only that of an assistant may be null, not of {self.role}")
        return self

    def for_template(self) -> dict[str, str]:
        """Templates know `system`, not its newer name `developer`."""
        content = (
            self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or [])
        )
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _check_limits(self) -> "ChatBody":
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs true", param="top_logprobs")
        return self
