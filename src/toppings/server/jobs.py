"""One request as the sequences it asks for: several prompts, several choices of each."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TypeVar

from toppings.adapters.errors import AdapterNotFound
from toppings.bad_input import ContextLengthError, RequestError, shown
from toppings.core import ALONE, Standing
from toppings.detokenizer import GenerationError, TextOutput, generate_text
from toppings.messages import PromptLogprobs, check_salt
from toppings.sampling_params import MAX_PROMPT_LOGPROBS, SamplingParams
from toppings.server.errors import ApiError
from toppings.server.exchange import current_exchange
from toppings.server.metrics import RequestTimer
from toppings.server.state import Lease, ServerState, Target
from toppings.server.streams import merged
from toppings.slo import SLO_CLASS_HEADER, is_batch
from toppings.tenants.refusals import denied
from toppings.tenants.tenant import Tenant
from toppings.text import TextLogprob, TextModel

LONG_TEXT = 4096
"""Characters, tokens or values of an answer above which they are worked on in a thread."""

T = TypeVar("T")


@dataclass(slots=True)
class Choice:
    """All of one sequence's output, put together."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TextLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | None = None
    embedding: bytes | None = None

    def add(self, output: TextOutput) -> None:
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        self.embedding = self.embedding or output.embedding


@dataclass(kw_only=True)
class Job:
    """Choice `i` of prompt `p` has index `p * num_choices + i`. `started_at` is of `time.perf_counter`.
    `num_cached_tokens` of the prompts were in the engine's cache, as far as is known yet."""

    state: ServerState
    target: Target
    prompts: list[list[int]]
    sampling: SamplingParams
    num_choices: int = 1
    is_bounded: bool = True
    """Whether the request says how long its answer may be: so much of its tenant's limit is reserved."""
    include_stop: bool = False
    shown: Mapping[int, str] | None = None
    """Special tokens that are text all the same, by their ids."""
    cache_salt: str | None = None
    standing: Standing = ALONE
    num_cached_tokens: int = 0
    started_at: float = field(default_factory=time.perf_counter)
    timers: list[RequestTimer] = field(default_factory=list)
    tenant: Tenant = field(init=False)

    def __post_init__(self) -> None:
        self.tenant = self.state.account.tenant
        self.standing = replace(
            self.standing,
            tenant=self.tenant.name,
            weight=self.tenant.weight,
            is_batch=is_of_batch(self.tenant),
        )
        check_salt(self.cache_salt)
        policy = self.state.config.engine.scheduling_policy
        if self.standing.priority and policy != "priority":
            message = (
                f"priority is {self.standing.priority}, but this server's scheduling_policy is {policy!r}"
            )
            raise ApiError(400, f"{message}; leave it out", param="priority")
        if self.standing.priority < self.tenant.min_priority and not self.tenant.is_admin:
            message = f"priority {self.standing.priority} is below the min_priority of tenant"
            raise denied(f"{message} `{self.tenant.name}`, {self.tenant.min_priority}")
        for prompt in self.prompts:
            check_prompt(self.state, self.target, prompt, self.sampling.max_tokens)
        sampling = self.sampling
        check_token_ids(self.state, self.target, "stop_token_ids", sampling.stop_token_ids)
        check_token_ids(self.state, self.target, "allowed_token_ids", sampling.allowed_token_ids)
        check_token_ids(self.state, self.target, "logprob_token_ids", sampling.logprob_token_ids)
        check_token_ids(
            self.state, self.target, "logit_bias", [token_id for token_id, _ in sampling.logit_bias]
        )
        if sampling.prompt_logprobs is not None:
            self._check_told(self.num_choices * self.num_prompt_tokens, sampling.prompt_logprobs + 1)

    @staticmethod
    def _check_told(num_tokens: int, num_each: int) -> None:
        """Raises RequestError for more log-probabilities of prompts than an answer may hold."""
        if num_tokens * num_each > MAX_PROMPT_LOGPROBS:
            raise RequestError(
                f"the request asks for {num_tokens * num_each} log-probabilities of prompts ({num_tokens}"
                f" tokens, {num_each} each); at most {MAX_PROMPT_LOGPROBS} are told at once"
            )

    @property
    def text(self) -> TextModel:
        return self.state.text_of(self.target)

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.num_choices

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    async def stream(self, lease: Lease) -> AsyncGenerator[tuple[int, TextOutput], None]:
        """Outputs of all sequences with their indices, as they come. Closing it aborts what is left.

        Raises Refusal 429 where its prompts, with answers as long as they may be, have more tokens than the
        tenant has left.
        """
        num_answers = self.num_sequences if self.is_bounded else 0
        lease.place.take(self.num_prompt_tokens, num_answers * self.sampling.max_tokens)
        sequences = [self._sequence(index, lease) for index in range(self.num_sequences)]
        async with aclosing(merged(sequences)) as outputs:
            async for item in outputs:
                yield item

    def new_choice(self) -> Choice:
        return Choice()

    async def collect(self, lease: Lease) -> list[Choice]:
        choices = [self.new_choice() for _ in range(self.num_sequences)]
        async with aclosing(self.stream(lease)) as outputs:
            async for index, output in outputs:
                choices[index].add(output)
        return choices

    async def _sequence(self, index: int, lease: Lease) -> AsyncGenerator[TextOutput, None]:
        prompt = self.prompts[index // self.num_choices]
        timer = RequestTimer(self.started_at, len(prompt), self.target.adapter_id is not None)
        self.timers.append(timer)
        if (exchange := current_exchange.get()) is not None:
            exchange.model, exchange.has_adapter = self.target.name, timer.has_adapter
            exchange.sampling = self.sampling
            exchange.timers.append(timer)
        try:
            async with aclosing(self._outputs(index, prompt)) as outputs:
                async for output in outputs:
                    if timer.num_tokens == 0:
                        lease.note_started()
                    self.state.metrics.note(timer, output)
                    self._note_cold(output, len(prompt))
                    lease.place.spend(len(output.token_ids))
                    if index % self.num_choices == 0:  # the others share what this one has computed
                        self.num_cached_tokens += output.num_cached_tokens or 0
                    yield output
        except Exception as error:
            timer.outcome = "error"
            if exchange is not None:
                exchange.error = str(error)
            self._explain(error)
            raise
        finally:
            timer.ended_at = time.perf_counter()
            self.state.metrics.observe(timer)

    def _note_cold(self, output: TextOutput, num_prompt_tokens: int) -> None:
        if output.cold_start is None:
            return
        exchange = current_exchange.get()
        self.state.cold_starts.note(
            output.cold_start,
            request_id="" if exchange is None else exchange.request_id,
            tenant=self.tenant.name,
            adapter=self.target.name,
            num_prompt_tokens=num_prompt_tokens,
        )

    async def _outputs(self, index: int, prompt: list[int]) -> AsyncGenerator[TextOutput, None]:
        """Begun once more where an adapter was damaged and is whole again."""
        sampling = self._sampling_of(index % self.num_choices)
        has_begun = False
        try:
            async with aclosing(self._generated(prompt, sampling, self.target.adapter_id)) as outputs:
                async for output in outputs:
                    has_begun = True
                    yield output
            return
        except GenerationError:
            resolver, is_adapter = self.state.resolver, self.target.adapter_id is not None
            if has_begun or resolver is None or not is_adapter:
                raise
            target = await resolver.repair(self.target)
            if target is None:
                raise
        async with aclosing(self._generated(prompt, sampling, target.adapter_id)) as outputs:
            async for output in outputs:
                yield output

    def _generated(
        self, prompt: list[int], sampling: SamplingParams, adapter_id: int | None
    ) -> AsyncGenerator[TextOutput, None]:
        state = self.state
        return generate_text(
            state.client,
            self.text,
            prompt,
            sampling,
            adapter_id,
            include_stop=self.include_stop,
            shown=self.shown,
            cache_salt=state.book.salt(self.tenant, self.cache_salt),
            standing=self.standing,
        )

    def _sampling_of(self, choice: int) -> SamplingParams:
        """Choices of a seeded request differ, and each is the same every time."""
        seed = self.sampling.seed
        if seed is None or choice == 0:
            return self.sampling
        return replace(self.sampling, seed=(seed + choice + 2**63) % 2**64 - 2**63)

    def _explain(self, error: Exception) -> None:
        """A request that lost its adapter between look-up and engine is told so: raises ApiError 404."""
        if isinstance(error, GenerationError) and self.target.adapter_id is not None:
            try:
                self.state.registry.get(self.target.name)
            except AdapterNotFound:
                self.state.target(self.target.name)


def is_of_batch(tenant: Tenant) -> bool:
    """Whether what is being answered is of the class batch. Raises ApiError 400 for one that there is not."""
    exchange = current_exchange.get()
    asked = "" if exchange is None else exchange.header(SLO_CLASS_HEADER.lower().encode())
    try:
        return is_batch(asked, tenant.slo_class)
    except ValueError as error:
        raise ApiError(400, str(error), param=SLO_CLASS_HEADER) from error


def check_prompt(state: ServerState, target: Target, prompt: list[int], max_tokens: int) -> None:
    """Raises RequestError for an empty prompt, or one that is too long together with `max_tokens`."""
    limit = state.client.info.max_model_len
    if not prompt:
        raise RequestError("the prompt is empty; it needs at least one token")
    if len(prompt) + max_tokens > limit:
        raise ContextLengthError(
            limit,
            len(prompt) + max_tokens,
            f"you requested {len(prompt) + max_tokens} tokens ({len(prompt)} in the messages, {max_tokens} in"
            " the completion). Please reduce the length of the messages or completion.",
        )
    check_token_ids(state, target, "prompt", prompt)


def check_token_ids(
    state: ServerState, target: Target, name: str, token_ids: list[int] | tuple[int, ...]
) -> None:
    vocab_size = state.vocab_size_of(target)
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(t for t in token_ids if not 0 <= t < vocab_size)
        raise RequestError(
            f"{name} holds token id {shown(wrong)}; the vocabulary has ids 0 to {vocab_size - 1}"
        )


def room_for_output(state: ServerState, prompts: list[list[int]]) -> int:
    """The most tokens that every one of `prompts` leaves room for, at least 1."""
    return max(1, state.client.info.max_model_len - max(len(prompt) for prompt in prompts))


async def tokens_of(
    state: ServerState,
    target: Target,
    prompts: list[str | list[int]],
    *,
    add_special_tokens: bool = True,
    num_last: int | None = None,
) -> list[list[int]]:
    """With `num_last`, the last so many of each at most. Raises RequestError for a text that is too long,
    before it is tokenised to its end."""
    text = state.text_of(target)
    if num_last is None:
        for prompt in prompts:
            text.check_chars(len(prompt) if isinstance(prompt, str) else 0)

    def tokens(prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt if num_last is None else prompt[-num_last:]
        if num_last is None:
            return text.encode(prompt, add_special_tokens=add_special_tokens)
        return text.encode_end(prompt, num_last, add_special_tokens=add_special_tokens)

    size = sum(len(prompt) for prompt in prompts)
    return await beside_loop(state, size, lambda: [tokens(prompt) for prompt in prompts])


def num_last_tokens(state: ServerState, truncate: int | None, max_tokens: int | None) -> int | None:
    """How many of a prompt's tokens `truncate_prompt_tokens` keeps: -1 is as many as fit before the output.

    Raises ApiError for a number that is out of range.
    """
    limit = state.client.info.max_model_len
    if truncate is None:
        return None
    if truncate == -1:
        return max(1, limit - (1 if max_tokens is None else max(0, max_tokens)))
    if not 1 <= truncate <= limit:
        raise ApiError(
            400,
            f"truncate_prompt_tokens is {shown(truncate)}; it must be -1, or between 1 and {limit}",
            param="truncate_prompt_tokens",
        )
    return truncate


async def beside_loop(state: ServerState, size: int, work: Callable[[], T]) -> T:
    """The result of `work` on so many characters, tokens or values: a long one is done in a thread.

    The tokeniser lets other threads run meanwhile; few are at work at once, the others wait.
    """
    if size <= LONG_TEXT:
        return work()
    return await asyncio.get_running_loop().run_in_executor(state.threads, work)
