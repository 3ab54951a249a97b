"""Text in, text out: a checkpoint's tokeniser and chat template, incremental detokenisation, stop strings."""

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from toppings.bad_input import ContextLengthError, RequestError, check_unicode
from toppings.chat_template import ChatRenderer, ChatTemplate, Messages
from toppings.core import FinishReason
from toppings.messages import ColdStart, PromptLogprobs, RequestOutput, TokenLogprobs
from toppings.model.tokenizer import load_tokenizer
from toppings.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"
CONTEXT_LEN = 6
"""Tokens of the prompt that the first output token is decoded with, so that its leading space survives."""
MAX_PENDING = 8
"""A character has at most four bytes; text that is still incomplete after more tokens never becomes valid."""
TOKEN_TEXT_CACHE = 1 << 16
SLICE_CHARS = 1 << 16
END_CHARS_PER_TOKEN = 8
SLICE_SLACK = 64
"""Tokens that a slice may have more than its part of the whole text: a cut can split words and tokens."""


BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece names the tokens of single bytes."""


@lru_cache(1)
def byte_of_char() -> dict[str, int]:
    """Byte-level tokenisers write a byte as one character: itself if that is printable, else from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(0x100)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


class GenerationError(RuntimeError):
    """The engine could not finish a request; the message says why."""


class GenerationCutError(GenerationError):
    """The engine ended a request early because it is shutting down."""


class TextModel:
    """The tokeniser of a checkpoint. Token ids are those of the model's vocabulary."""

    def __init__(self, tokenizer: Any) -> None:
        self.max_tokens: int | None = None
        """Of a text; more are refused without tokenising it to its end."""
        self._tokenizer = tokenizer
        self._anchor = self.encode("a", add_special_tokens=False)[-1:]
        self.template = _template_of(tokenizer, "default")
        self.tool_template = _template_of(tokenizer, "tool_use") or self.template
        """For chats with tools."""
        self._renderer = ChatRenderer(getattr(tokenizer, "special_tokens_map", {}))
        self._max_token_chars = max(map(len, tokenizer.get_vocab()), default=1)
        self.token_text = lru_cache(TOKEN_TEXT_CACHE)(self._token_text)
        self.token_bytes = lru_cache(TOKEN_TEXT_CACHE)(self._token_bytes)

    @classmethod
    def load(cls, path: Path) -> "TextModel":
        """Read from local files only. Raises ValueError where `path` holds no usable tokeniser."""
        if not path.is_dir():
            raise ValueError(f"no model directory at {path}")
        try:
            return cls(load_tokenizer(path))
        except Exception as error:  # the library raises whatever its parsers do
            raise ValueError(f"cannot read a tokeniser from {path}: {error}") from error

    @property
    def special_tokens(self) -> list[str]:
        """Those that are no text, by their names."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return [token.content for token in added.values() if token.special]

    @property
    def has_chat_template(self) -> bool:
        return self.template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises RequestError for a text of more than `max_tokens`, or one that is no valid Unicode."""
        check_unicode("the text", text)
        self.check_chars(len(text))
        if len(text) > SLICE_CHARS:
            self._check_slices(text)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_end(self, text: str, num_tokens: int, *, add_special_tokens: bool = True) -> list[int]:
        """The last `num_tokens` tokens of a text of any length, of which no more is tokenised than they need.

        Raises RequestError for one that is no valid Unicode.
        """
        check_unicode("the text", text)
        num_chars = END_CHARS_PER_TOKEN * num_tokens + SLICE_CHARS
        while True:
            end = text[-num_chars:]
            ids: list[int] = list(self._tokenizer.encode(end, add_special_tokens=add_special_tokens))
            # Where the text was cut, some tokens are others than they would be in the whole of it.
            if len(end) == len(text) or len(ids) >= num_tokens + SLICE_SLACK:
                return ids[-num_tokens:]
            num_chars *= 2

    def check_chars(self, num_chars: int) -> None:
        """Raises RequestError where so many characters have more than `max_tokens` for certain."""
        if self.max_tokens is not None and num_chars > self.max_tokens * self._max_token_chars:
            raise _too_long(self.max_tokens, f"the prompt has {num_chars} characters")

    def _check_slices(self, text: str) -> None:
        """Tokenising takes some hundred bytes a token, so a long text is counted slice by slice before."""
        num_tokens = 0
        for start in range(0, len(text), SLICE_CHARS):
            piece = text[start : start + SLICE_CHARS]
            num_tokens += len(self._tokenizer.encode(piece, add_special_tokens=False)) - SLICE_SLACK
            if self.max_tokens is not None and num_tokens > self.max_tokens:
                begun = f"the prompt has {len(text)} characters, of which {start + len(piece)} were counted"
                raise _too_long(self.max_tokens, begun)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def chat(self, messages: Messages, template: ChatTemplate | None = None, **options: Any) -> list[int]:
        """Token ids of a conversation in the model's chat template, or another; `options` of `ChatRenderer`.

        Raises RequestError where the model has no template, or the template refuses the messages.
        """
        text = self._renderer.render(self._template(template), messages, **options)
        return self.encode(text, add_special_tokens=False)

    async def chat_text(
        self, messages: Messages, template: ChatTemplate | None = None, **options: Any
    ) -> str:
        """The text that `chat` would encode, made beside the event loop. Raises SandboxBusyError, too."""
        return await self._renderer.render_in_turn(self._template(template), messages, **options)

    def _template(self, template: ChatTemplate | None) -> ChatTemplate:
        found = template or self.template
        if found is None:
            raise RequestError("the model has no chat template; send the whole prompt to /v1/completions")
        return found

    def close(self) -> None:
        """Ends the processes that render templates; they also end with this object."""
        self._renderer.close()

    def single_tokens(self, texts: Sequence[str]) -> dict[str, int]:
        """Those of `texts` that are one token each, with its id."""
        ids = {text: self.encode(text, add_special_tokens=False) for text in texts}
        return {text: found[0] for text, found in ids.items() if len(found) == 1}

    def told(self, each: TokenLogprobs) -> "TextLogprob":
        """With texts."""
        top = [(token_id, self.token_text(token_id), value) for token_id, value in each.top]
        return TextLogprob(each.token_id, self.token_text(each.token_id), each.logprob, top, each.rank)

    def with_bad_token_ids(self, sampling: SamplingParams) -> SamplingParams:
        """The tokens of its `bad_words`, as they are at the beginning of a text and, where that is one more
        form of the same length, behind a space."""
        found = []
        for word in sampling.bad_words:
            plain, spaced = (
                tuple(self.encode(space + word.lstrip(" "), add_special_tokens=False)) for space in ("", " ")
            )
            found += [plain, spaced] if len(spaced) == len(plain) and spaced[:1] != plain[:1] else [plain]
        return (
            replace(sampling, bad_token_ids=(*sampling.bad_token_ids, *filter(None, found)))
            if found
            else sampling
        )

    def _token_text(self, token_id: int) -> str:
        """The text of one token as it stands inside a sentence, special tokens by their names."""
        anchor = self.decode(self._anchor, skip_special_tokens=False)
        return self.decode([*self._anchor, token_id], skip_special_tokens=False)[len(anchor) :]

    def stored_tokens(self, token_ids: Sequence[int]) -> list[str]:
        """As the tokeniser's vocabulary writes them."""
        return [str(token) for token in self._tokenizer.convert_ids_to_tokens(list(token_ids))]

    def token_name(self, token_id: int) -> str:
        """Its text; for a token that is part of a character its bytes, as `bytes:\\xe2\\x80`."""
        text = self.token_text(token_id)
        if REPLACEMENT not in text or (content := self.token_bytes(token_id)) == text.encode():
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def _token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text's UTF-8, also where it is only a part of a character."""
        text = self.token_text(token_id)
        stored = self._tokenizer.convert_ids_to_tokens(token_id) if REPLACEMENT in text else None
        if not isinstance(stored, str):
            return text.encode()
        if match := BYTE_TOKEN.fullmatch(stored):
            return bytes.fromhex(match[1])
        content = [byte_of_char().get(char) for char in stored]
        return text.encode() if None in content else bytes(b for b in content if b is not None)


def _too_long(limit: int, what: str) -> ContextLengthError:
    asked = f"{what}, so more than {limit} tokens. Please reduce the length of the prompt."
    return ContextLengthError(limit, limit + 1, asked)


def _template_of(tokenizer: Any, name: str) -> ChatTemplate | None:
    """A tokeniser may have several templates, by name; the only one is the default one."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        found = found.get(name)
    elif name != "default":
        return None
    return ChatTemplate(found, "the model") if found else None


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


class StopMatcher:
    """Lets text through up to the first stop string; holds back what might yet become one."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._begun = [_BegunStop(stop) for stop in dict.fromkeys(stops)]
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text to show now, and the stop string that ended it, if one did."""
        new, text = text, self._held + text
        found = [(start, -len(b.stop), b.stop) for b in self._begun if (start := text.find(b.stop)) >= 0]
        if found:
            start, _, stop = min(found)
            self._held = ""
            return text[: start + len(stop)] if self._include_stop else text[:start], stop
        num_held = max((begun.push(new) for begun in self._begun), default=0)
        cut = len(text) - num_held
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class _BegunStop:
    """How much of one stop string the end of the text is (Knuth-Morris-Pratt): constant time a character.

    `_borders[k]` is the length of the longest proper end of `stop[:k]` that begins `stop`, as far as needed.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self._num_matched = 0
        self._borders = [0, 0]

    def push(self, text: str) -> int:
        for char in text:
            self._num_matched = self._longer(self._num_matched, char)
        return self._num_matched

    def _longer(self, length: int, char: str) -> int:
        while length and (length == len(self.stop) or self.stop[length] != char):
            length = self._border(length)
        return length + (self.stop[length] == char)

    def _border(self, length: int) -> int:
        while len(self._borders) <= length:
            end = len(self._borders) - 1
            self._borders.append(self._longer(self._borders[end], self.stop[end]))
        return self._borders[length]


@dataclass(frozen=True, slots=True)
class TextLogprob:
    """A chosen token with its text, natural-log probability, rank and the best alternatives (id, text,
    logprob)."""

    token_id: int
    text: str
    logprob: float
    top: list[tuple[int, str, float]]
    rank: int = 0


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
        tenant: str = "",
        weight: float = 1.0,
        priority: int = 0,
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
    tenant: str = "",
    weight: float = 1.0,
    priority: int = 0,
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
        tenant=tenant,
        weight=weight,
        priority=priority,
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
