"""A checkpoint's tokeniser and chat template: text to tokens, tokens to text."""

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from toppings.adapters.vocabulary import Vocabulary
from toppings.bad_input import ContextLengthError, RequestError, check_unicode
from toppings.chat_template import ChatRenderer, ChatTemplate, Messages
from toppings.messages import TokenLogprobs
from toppings.model.tokenizer import load_tokenizer, with_tokens
from toppings.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"
"""What the bytes of an unfinished character are decoded to."""
TOKEN_TEXT_CACHE = 1 << 16
SLICE_CHARS = 1 << 16
END_CHARS_PER_TOKEN = 8
MAX_OWN = 8
"""Adapters' vocabularies that are kept at hand; one takes as much memory as the base model's."""
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


@dataclass(frozen=True, slots=True)
class TextLogprob:
    """A chosen token with its text, natural-log probability, rank and the best alternatives (id, text,
    logprob)."""

    token_id: int
    text: str
    logprob: float
    top: list[tuple[int, str, float]]
    rank: int = 0


class TextModel:
    """The tokeniser of a checkpoint. Token ids are those of the model's vocabulary."""

    def __init__(self, tokenizer: Any, renderer: ChatRenderer | None = None) -> None:
        self.max_tokens: int | None = None
        """Of a text; more are refused without tokenising it to its end."""
        self._tokenizer = tokenizer
        self._making = threading.Lock()
        self._anchor = self.encode("a", add_special_tokens=False)[-1:]
        self.template = _template_of(tokenizer, "default")
        self.tool_template = _template_of(tokenizer, "tool_use") or self.template
        """For chats with tools."""
        special = getattr(tokenizer, "special_tokens_map", {})
        self._renderer = ChatRenderer(special) if renderer is None else renderer.with_variables(special)
        self._own: OrderedDict[Vocabulary, TextModel] = OrderedDict()
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

    def of(self, vocabulary: Vocabulary | None) -> "TextModel":
        """Of an adapter with its own vocabulary; this one where it has none. Made once, in a second or less
        each, and safe to be asked for from any thread."""
        if vocabulary is None or not (vocabulary.tokens or vocabulary.names):
            return self
        with self._making:
            if (own := self._own.get(vocabulary)) is None:
                tokenizer = with_tokens(self._tokenizer, vocabulary.tokens, vocabulary.names)
                own = self._own[vocabulary] = TextModel(tokenizer, self._renderer)
                own.max_tokens = self.max_tokens
                if len(self._own) > MAX_OWN:
                    self._own.popitem(last=False)
            self._own.move_to_end(vocabulary)
            return own

    @property
    def special_tokens(self) -> list[str]:
        """Those that are no text, by their names."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return [token.content for token in added.values() if token.special]

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
