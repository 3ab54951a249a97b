"""An engine's tokens to text as they come: incremental detokenisation, stop strings, what a step added."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from toppings.core import ALONE, FinishReason, Standing
from toppings.messages import ColdStart, PromptLogprobs, RequestOutput, TokenLogprobs
from toppings.sampling_params import SamplingParams
from toppings.stop_strings import StopMatcher
from toppings.text import REPLACEMENT, TextLogprob, TextModel

CONTEXT_LEN = 6
"""Tokens of the prompt that the first output token is decoded with, so that its leading space survives."""
MAX_PENDING = 8
"""A character has at most four bytes; text that is still incomplete after more tokens never becomes valid."""


class GenerationError(RuntimeError):
    """The engine could not finish a request; the message says why."""


class GenerationCutError(GenerationError):
    """The engine ended a request early because it is shutting down."""


class Detokenizer:
    """Token by token to text; a character that spans tokens is held until it is whole.

    `shown`: special tokens that are text all the same, by their ids.
    """

    def __init__(
        self,
        model: TextModel,
        prompt_token_ids: Sequence[int] = (),
        *,
        shown: Mapping[int, str] | None = None,
    ) -> None:
        self._model = model
        self._shown = shown or {}
        self._context = list(prompt_token_ids[-CONTEXT_LEN:])
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._shown:
            return self.flush() + self._shown[token_id]
        self._pending.append(token_id)
        before, text = self._decoded()
        is_whole = len(text) > len(before) and not text.endswith(REPLACEMENT)
        return self._emit(before, text) if is_whole or len(self._pending) > MAX_PENDING else ""

    def flush(self) -> str:
        """What is left of an unfinished character, as the tokeniser shows it."""
        return self._emit(*self._decoded()) if self._pending else ""

    def _decoded(self) -> tuple[str, str]:
        return self._model.decode(self._context), self._model.decode(self._context + self._pending)

    def _emit(self, before: str, text: str) -> str:
        self._context, self._pending = self._pending, []
        return text[len(before) :]


@dataclass(frozen=True, slots=True)
class TextOutput:
    """What one step added to a request; `text` may lag behind `token_ids`, but is whole with the last one.

    `stop_reason` is the stop string or stop token id that ended the text; None at the end of the sequence.
    What the engine tells of the prompt is with the first one.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TextLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    queue_ms: float | None = None
    cold_start: ColdStart | None = None
    num_cached_tokens: int | None = None  # with the first token: of the prompt, taken from the cache
    prompt_logprobs: PromptLogprobs | None = None
    embedding: bytes | None = None


class TokenSource(Protocol):
    """The part of an engine client that makes tokens."""

    def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        adapter_id: int | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        standing: Standing = ALONE,
    ) -> AsyncGenerator[RequestOutput, None]: ...


class TextAssembler:
    """Engine outputs of one request to text outputs: detokenises, applies stop strings."""

    def __init__(
        self,
        model: TextModel,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        include_stop: bool = False,
        shown: Mapping[int, str] | None = None,
    ) -> None:
        self._model = model
        self._detokenizer = Detokenizer(model, prompt_token_ids, shown=shown)
        self._matcher = StopMatcher(sampling.stop, include_stop=include_stop)
        self._sampling = sampling
        self._include_stop = include_stop
        self._num_tokens = 0

    def push(self, output: RequestOutput) -> TextOutput:
        num_hidden = self._num_hidden(output)
        text, stop, num_used = "", None, 0
        for token_id in output.token_ids[: len(output.token_ids) - num_hidden]:
            num_used += 1
            shown, stop = self._push_token(token_id)
            text += shown
            if stop is not None:
                break
        else:
            num_used += num_hidden
        finish_reason = FinishReason.STOP if stop is not None else output.finish_reason
        if stop is None and finish_reason is not None:
            rest, stop = self._matcher.push(self._detokenizer.flush())
            text += rest if stop is not None else rest + self._matcher.flush()
        return TextOutput(
            text,
            output.token_ids[:num_used],
            self._texts(output.logprobs, num_used),
            finish_reason,
            stop if stop is not None else output.stop_token_id,
            output.queue_ms,
            output.cold_start,
            output.num_cached_tokens,
            output.prompt_logprobs,
            output.embedding,
        )

    def _push_token(self, token_id: int) -> tuple[str, str | None]:
        """Stop strings count only in text that comes after the first `min_tokens` tokens."""
        self._num_tokens += 1
        text = self._detokenizer.push(token_id)
        return self._matcher.push(text) if self._num_tokens > self._sampling.min_tokens else (text, None)

    def _num_hidden(self, output: RequestOutput) -> int:
        """The token that made the engine stop is no text, unless it was asked for and is to be shown."""
        is_shown = self._include_stop and output.stop_token_id is not None
        return int(output.finish_reason is FinishReason.STOP and bool(output.token_ids) and not is_shown)

    def _texts(self, logprobs: list[TokenLogprobs] | None, num_used: int) -> list[TextLogprob] | None:
        if logprobs is None:
            return None
        return [self._model.told(each) for each in logprobs[:num_used]]


async def generate_text(
    source: TokenSource,
    model: TextModel,
    prompt_token_ids: list[int],
    sampling: SamplingParams,
    adapter_id: int | None = None,
    *,
    include_stop: bool = False,
    shown: Mapping[int, str] | None = None,
    request_id: str | None = None,
    cache_salt: str | None = None,
    standing: Standing = ALONE,
) -> AsyncGenerator[TextOutput, None]:
    """Text as the engine makes it; the last output has a finish reason. Closing it aborts the request.

    `shown`: special tokens that are text all the same, by their ids.

    Raises GenerationError where the engine gives up on the request, GenerationCutError where it shuts down.
    """
    sampling = model.with_bad_token_ids(sampling)
    assembler = TextAssembler(model, prompt_token_ids, sampling, include_stop=include_stop, shown=shown)
    outputs = source.generate(
        prompt_token_ids,
        sampling,
        adapter_id,
        request_id=request_id,
        cache_salt=cache_salt,
        standing=standing,
    )
    async with aclosing(outputs):
        async for output in outputs:
            if output.finish_reason is FinishReason.ERROR:
                raise GenerationError(output.error or "the engine gave no reason")
            if output.finish_reason is FinishReason.ABORT:
                raise GenerationCutError(output.error or "the request was aborted")
            result = assembler.push(output)
            yield result
            if result.finish_reason is not None:
                return
