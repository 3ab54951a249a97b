"""What the router reads of an inference request's body; the body itself goes on as it came."""

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec

from toppings.cluster.router.prompt_blocks import BLOCK_BYTES, name_blocks
from toppings.cluster.router.replies import ApiError

DEFAULT_MAX_TOKENS = 16  # of completions and /generate; chat has none
BASE_MODEL = "__base_model__"
MAX_NAME_LEN = 512
"""No model has a longer name; one that is asked for is not remembered."""
SAMPLE_BYTES = 2**16
"""So much of a prompt is looked at to estimate its tokens."""

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
POOLED_PATHS = ("/v1/embeddings", "/v1/score", "/score")
TOKEN_PATHS = ("/tokenize", "/detokenize", "/v1/messages/count_tokens")
"""They generate nothing, and go where the model is all the same."""
INFERENCE_PATHS = (
    *("/v1/completions", CHAT, RESPONSES, MESSAGES, "/generate", "/generate_stream"),
    *(*POOLED_PATHS, *TOKEN_PATHS),
)


@dataclass(frozen=True, slots=True)
class Call:
    """`model` is None where the body names none: the base model. Prompt tokens are an estimate for text.

    `selectors` is all that a body of `/generate` names its adapter by. `blocks` name what the prompt begins
    with, in parts of `block_tokens` each. `wrong` says what of the body has a type that keeps the rest from
    being read. `num_answers`: choices of all its prompts together.
    """

    path: str
    body: bytes
    model: str | None = None
    is_stream: bool = False
    prompt_tokens: int = 1
    max_tokens: int | None = None
    selectors: tuple[str, ...] = ()
    blocks: tuple[bytes, ...] = ()
    block_tokens: float = 0.0
    wrong: str = ""
    num_answers: int = 1

    @property
    def reserved_tokens(self) -> int:
        """That its answer may have, as far as the body says."""
        if self.max_tokens is None or self.path in (*TOKEN_PATHS, *POOLED_PATHS):
            return 0
        return max(0, self.max_tokens) * self.num_answers


class _Body(msgspec.Struct):
    """Fields of every route together; each route uses its own."""

    model: str | None = None
    stream: bool | None = None
    prompt: msgspec.Raw = msgspec.Raw(b'""')
    messages: msgspec.Raw = msgspec.Raw(b'""')
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    input: msgspec.Raw = msgspec.Raw(b'""')
    inputs: msgspec.Raw = msgspec.Raw(b'""')
    text_2: msgspec.Raw = msgspec.Raw(b'""')
    parameters: dict[str, Any] | None = None
    lora_id: int | None = None
    lora_dir: str | None = None
    cache_salt: msgspec.Raw = msgspec.Raw(b"")
    system: msgspec.Raw = msgspec.Raw(b"")
    tools: msgspec.Raw = msgspec.Raw(b"")


_LIST_OF = re.compile(rb"""\s*\[\s*(["\[])""")
"""The start of a list of strings or of lists."""

NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding a body may raise: of its syntax, of its encoding, of its depth."""


def not_json(error: BaseException) -> ApiError:
    reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
    return ApiError(400, f"1 validation error:\n  body: {reason}")


_decoder = msgspec.json.Decoder(_Body, strict=False)


def parse_call(path: str, body: bytes, bytes_per_token: float, *, names_blocks: bool = False) -> Call:
    """Blocks are named only where they are asked for. Raises ApiError 400 where the body is no JSON. Fields
    of a wrong type are the server's to refuse.
    """
    try:
        parsed = _decoder.decode(body)
    except msgspec.ValidationError as error:
        return Call(path, body, wrong=str(error))
    except NO_JSON as error:
        raise not_json(error) from error
    if path.startswith("/generate"):
        call, prompt = _parse_generate(path, body, parsed, bytes_per_token), parsed.inputs
        return _with_blocks(call, parsed, prompt) if names_blocks else call
    if path in TOKEN_PATHS:
        return Call(path, body, model=parsed.model or None, max_tokens=1)
    prompt, max_tokens = _asked(path, parsed)
    call = Call(
        path=path,
        body=body,
        model=parsed.model or None,
        is_stream=bool(parsed.stream),
        prompt_tokens=_count_tokens(prompt, bytes_per_token),
        max_tokens=max_tokens,
        num_answers=_count_answers(path, parsed),
    )
    return _with_blocks(call, parsed, prompt) if names_blocks and path not in POOLED_PATHS else call


def _with_blocks(call: Call, parsed: _Body, prompt: msgspec.Raw) -> Call:
    kind = "/generate" if call.path.startswith("/generate") else call.path
    texts = (kind, call.model or "")
    root = (*(text.encode("utf-8", "surrogateescape") for text in texts), *map(bytes, _context_of(parsed)))
    text = memoryview(prompt)
    blocks = name_blocks(root, text)
    return replace(call, blocks=blocks, block_tokens=call.prompt_tokens * BLOCK_BYTES / max(1, len(text)))


def _context_of(parsed: _Body) -> tuple[msgspec.Raw, ...]:
    """What stands before a prompt, or keeps its blocks apart."""
    return parsed.cache_salt, parsed.system, parsed.tools


def _asked(path: str, parsed: _Body) -> tuple[msgspec.Raw, int | None]:
    """What makes the prompt, and how much may follow it."""
    match path:
        case "/v1/chat/completions":
            is_new = parsed.max_tokens is None
            return parsed.messages, parsed.max_completion_tokens if is_new else parsed.max_tokens
        case "/v1/messages":
            return parsed.messages, parsed.max_tokens
        case "/v1/responses":
            return parsed.input, parsed.max_output_tokens
        case "/v1/embeddings":
            return parsed.input, 1
        case "/v1/score" | "/score":
            return parsed.text_2, 1
    return parsed.prompt, DEFAULT_MAX_TOKENS if parsed.max_tokens is None else parsed.max_tokens


def _count_answers(path: str, parsed: _Body) -> int:
    """Of every prompt the choices that are drawn, told or not."""
    if path != "/v1/completions":
        return max(1, parsed.n or 1)
    return max(1, parsed.n or 1, parsed.best_of or 1) * _count_prompts(parsed.prompt)


def _count_prompts(raw: msgspec.Raw) -> int:
    """Of a completion: of a list of strings or of lists its length, of all else one. The text may be long: it
    is counted without making its items."""
    found = _LIST_OF.match(memoryview(raw))
    if found is None:
        return 1
    text = bytes(raw)
    if found[1] == b"[":
        return text.count(b"[") - 1
    if b"\\" in text:
        text = text.replace(rb"\\", b"").replace(rb"\"", b"")  # what is left of quotes are strings' ends
    return text.count(b'"') // 2


def _parse_generate(path: str, body: bytes, parsed: _Body, bytes_per_token: float) -> Call:
    parameters = parsed.parameters or {}
    merged = parameters.get("merged_adapters")
    ids = merged.get("ids") if isinstance(merged, dict) else None
    merged_ids = ids if isinstance(ids, list) else []
    given = (parameters.get("adapter_id"), parsed.lora_dir, parsed.lora_id, *merged_ids)
    selectors = tuple(str(selector) for selector in given if selector is not None)
    model = next(iter(selectors), None)
    max_tokens = parameters.get("max_new_tokens")
    return Call(
        path=path,
        body=body,
        model=None if model == BASE_MODEL or len(model or "") > MAX_NAME_LEN else model,
        is_stream=path == "/generate_stream",
        prompt_tokens=_count_tokens(parsed.inputs, bytes_per_token),
        max_tokens=max_tokens if isinstance(max_tokens, int) else DEFAULT_MAX_TOKENS,
        selectors=tuple(name for name in selectors if name != BASE_MODEL),
    )


def _count_tokens(raw: msgspec.Raw, bytes_per_token: float) -> int:
    """Token ids are counted, by the commas of the first ones; of text, the length tells."""
    text = memoryview(raw)
    sample = bytes(text[:SAMPLE_BYTES])
    is_token_ids = sample.startswith(b"[") and not (b'"' in sample[:64] or b"{" in sample[:64])
    if is_token_ids:
        return round(sample.count(b",") * len(text) / len(sample)) + 1
    return max(1, round(len(text) / bytes_per_token))


Count = Annotated[int, msgspec.Meta(ge=0)]


class Usage(msgspec.Struct):
    """What an answer says of its tokens, by any route's names; None where it does not say."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None

    @property
    def prompt(self) -> int | None:
        return self.input_tokens if self.prompt_tokens is None else self.prompt_tokens

    @property
    def answer(self) -> int | None:
        return self.output_tokens if self.completion_tokens is None else self.completion_tokens


class _Answer(msgspec.Struct):
    usage: Usage | None = None
    count_output_tokens: Count | None = None


_answer_decoder = msgspec.json.Decoder(_Answer)


def read_usage(body: bytes) -> Usage:
    """Of a whole answer. Raises ValueError: no JSON."""
    try:
        answer = _answer_decoder.decode(body)
    except msgspec.ValidationError:
        return Usage()
    except NO_JSON as error:
        raise ValueError(str(error)) from error
    return answer.usage or Usage(output_tokens=answer.count_output_tokens)
