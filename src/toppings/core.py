"""The vocabulary that every room shares: requests, sampling parameters, batches, messages between processes.

Imports nothing of ours and no torch, so that the scheduler, the simulator and the router can use it bare.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum, StrEnum

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections a LoRA may target, in the order every table and packed file uses."""

GROUPS: dict[str, tuple[int, ...]] = {"qkv": (0, 1, 2), "o": (3,), "gate_up": (4, 5), "down": (6,)}
"""Projection groups: indices into `MODULES` of the projections that read the same input."""

MAX_LOGPROBS = 20
MAX_INT = 2**31 - 1
"""Largest count or token id of a request: all of them fit the integers of messages and kernels."""
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_SHOWN_CHARS = 200
MAX_STRUCTURE_CHARS = 2**18
"""Length of a schema, pattern, list of choices or grammar."""
MAX_PROMPT_LOGPROBS = 2**19
"""Log-probabilities of prompts that one request may be told: of each token and its alternatives."""
MAX_BIAS = 100.0
MAX_BIASES = 1024
MAX_ALLOWED_TOKEN_IDS = 2**16
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_SALT_CHARS = 1024

BlockHash = Hashable
"""Names the tokens of a full page of the key-value cache, all tokens before them, and whatever else their
keys and values depend on: two pages of one name hold the same."""


def parse_targets(text: str) -> tuple[str, ...]:
    """Projections out of names with commas between, or "all". Raises ValueError for a name that is none."""
    names = MODULES if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in MODULES:
            raise ValueError(f"target {name!r} is unknown; choose from {', '.join(MODULES)}, or all")
    return names


def shown(value: object, max_chars: int = MAX_SHOWN_CHARS) -> str:
    """`value` as a message or a log line may hold it: cut, and without halves of UTF-16 pairs."""
    text = value if isinstance(value, str) else _text_of_number(value)
    num_more = len(text) - max_chars
    if num_more > 0:
        text = f"{text[:max_chars]}... ({num_more} more characters)"
    return text.encode("utf-8", "backslashreplace").decode()


def _text_of_number(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # Python writes no integers of more than 4300 digits
        return "an integer of more than 4300 digits"


def check_unicode(name: str, text: str) -> None:
    """Raises RequestError for a text that UTF-8 cannot write: one that holds half of a UTF-16 pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise RequestError(
            f"{name} is no valid Unicode: character {error.start} is {half}, half of a surrogate pair"
        ) from None


class RequestError(ValueError):
    """The request cannot be served; the message names the offending value and what would be right."""


class ContextLengthError(RequestError):
    """A prompt is too long for the model's context, alone or with the output that was asked for.

    The message begins as OpenAI's does: clients look for that to shorten their prompts. `asked` says what
    there is too much of; `num_tokens` counts it, at least.
    """

    def __init__(self, limit: int, num_tokens: int, asked: str) -> None:
        self.limit, self.num_tokens = limit, num_tokens
        super().__init__(f"This model's maximum context length is {limit} tokens. However, {asked}")


class FinishReason(StrEnum):
    """Why a request ended; every accepted request ends with exactly one of these."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Admission(Enum):
    """What adapter placement answers when a request wants to start."""

    READY = "ready"  # pinned for the request; its load to the device is done or under way
    LOADING = "loading"  # not in host memory yet, the read is under way: ask again
    NO_ROOM = "no room"  # the device pool is full of adapters in use


class StructureKind(StrEnum):
    """What an output may be held to, and what `Structure.text` says of it."""

    JSON_OBJECT = "json_object"  # any JSON object; the text is empty
    JSON_SCHEMA = "json_schema"  # JSON that a schema accepts; the schema, as JSON
    REGEX = "regex"  # a text that the pattern matches as a whole; the pattern
    CHOICE = "choice"  # one of some texts; a JSON array of strings
    GRAMMAR = "grammar"  # a text of a context-free language; a grammar in Lark's notation


@dataclass(frozen=True, slots=True)
class Structure:
    """What the whole output must be; it ends where the end-of-sequence token says so, not before.

    Raises RequestError for a kind that there is not, and a text of more than `MAX_STRUCTURE_CHARS`. Whether
    the text means anything is for `toppings.grammar` to say.
    """

    kind: StructureKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in list(StructureKind):
            kinds = ", ".join(StructureKind)
            raise RequestError(f"the structure's kind is {shown(repr(self.kind))}; it must be one of {kinds}")
        if not isinstance(self.text, str):
            raise RequestError(f"the structure's text is {shown(repr(self.text))}; it must be a string")
        if len(self.text) > MAX_STRUCTURE_CHARS:
            raise RequestError(
                f"the {self.kind} has {len(self.text)} characters; it may have at most {MAX_STRUCTURE_CHARS}"
            )
        check_unicode(f"the {self.kind}", self.text)
        if bool(self.text) == (self.kind == StructureKind.JSON_OBJECT):
            raise RequestError(
                f"a structure of kind {self.kind} {'takes no' if self.text else 'needs a'} text"
            )


class Pooling(StrEnum):
    """Which final hidden states a prompt's embedding is made of; its length is 1 in any case."""

    LAST = "last"  # the last token's
    MEAN = "mean"  # the mean of all tokens'


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off.

    `logprobs` is how many alternatives to report beside each chosen token (None: no logprobs at all), and
    `prompt_logprobs` beside each token of the prompt but the first.
    `stop` strings are matched by the front end on text; the engine itself only knows `stop_token_ids`.
    There may be `MAX_STOP_STRINGS` of up to `MAX_STOP_CHARS` characters, and `MAX_STOP_TOKEN_IDS` ids.
    `structure` is what the output is held to: no token is drawn that cannot lead to it.

    `logit_bias`: (token id, what is added to its logit), at most `MAX_BIASES` of -`MAX_BIAS` to `MAX_BIAS`.
    `allowed_token_ids`: only these are drawn, where there are any. `bad_words`, up to `MAX_BAD_WORDS` of
    `MAX_BAD_WORD_CHARS` characters, are told the engine by the front end as `bad_token_ids`: where the output
    ends with all of such a sequence but its last token, that one is not drawn.

    With `max_tokens` 0 the prompt is read and nothing drawn: for `prompt_logprobs`, or for the embedding that
    `pooling` asks for.

    Raises RequestError for a value of another type or outside its range.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structure: Structure | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        _check_count("max_tokens", self.max_tokens, 0 if self.reads_prompt else 1, MAX_INT)
        _check_count("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, low_is_open=True)
        _check_count("top_k", self.top_k, 0, MAX_INT)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            _check_count("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _check_count("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos is {shown(repr(self.ignore_eos))}; it must be true or false")
        if self.prompt_logprobs is not None:
            _check_count("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.pooling is not None:
            self._check_pooling()
        if not isinstance(self.structure, Structure | None):
            raise RequestError(f"structure is {shown(repr(self.structure))}; it must be a Structure")
        if self.structure is not None and self.ignore_eos:
            raise RequestError(
                f"structure ({self.structure.kind}) and ignore_eos were both given; a structured output ends"
                " where it is complete, so leave ignore_eos out"
            )
        self._check_stops()
        self._check_choice()

    @property
    def reads_prompt(self) -> bool:
        """It asks for something of every token of the prompt, so that all of them must be computed."""
        return self.prompt_logprobs is not None or self.pooling is not None

    def _check_pooling(self) -> None:
        if self.pooling not in list(Pooling):
            kinds = ", ".join(Pooling)
            raise RequestError(f"pooling is {shown(repr(self.pooling))}; it must be one of {kinds}")
        if self.max_tokens or self.prompt_logprobs is not None:
            raise RequestError("pooling goes with max_tokens 0 and without prompt_logprobs")

    def _check_choice(self) -> None:
        """Of what changes which tokens may be drawn."""
        _check_length("logit_bias", self.logit_bias, MAX_BIASES, "biases")
        for token_id, bias in self.logit_bias:
            _check_count("logit_bias holds an id that", token_id, 0, MAX_INT)
            _check_range(f"logit_bias of token {token_id}", bias, -MAX_BIAS, MAX_BIAS)
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise RequestError("logit_bias names a token id twice; give each one bias")
        _check_length("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS, "ids")
        for token_id in _odd_ids(self.allowed_token_ids):
            _check_count("allowed_token_ids holds an id that", token_id, 0, MAX_INT)
        if self.allowed_token_ids and self.structure is not None:
            raise RequestError(
                f"allowed_token_ids and structure ({self.structure.kind}) were both given; the structure says"
                " which tokens are allowed, so leave allowed_token_ids out"
            )
        _check_length("bad_words", self.bad_words, MAX_BAD_WORDS, "words")
        for word in self.bad_words:
            if not 1 <= len(word.lstrip(" ")) <= MAX_BAD_WORD_CHARS:
                raise RequestError(
                    f"bad_words holds {shown(repr(word))}; each needs 1 to {MAX_BAD_WORD_CHARS} characters"
                    " that are no leading spaces"
                )
            check_unicode("bad_words", word)

    def _check_stops(self) -> None:
        _check_length("stop", self.stop, MAX_STOP_STRINGS, "strings")
        for text in self.stop:
            if not isinstance(text, str):
                raise RequestError(f"stop holds {shown(repr(text))}; it must hold strings")
            if not text:
                raise RequestError(
                    "stop holds an empty string; each stop string needs at least one character"
                )
            if len(text) > MAX_STOP_CHARS:
                raise RequestError(
                    f"stop holds a string of {len(text)} characters; each may have at most {MAX_STOP_CHARS}"
                )
            check_unicode("stop", text)
        _check_length("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS, "ids")
        for token_id in self.stop_token_ids:
            _check_count("stop_token_ids holds an id that", token_id, 0, MAX_INT)


def _check_count(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{name} is {shown(repr(value))}; it must be an integer")
    _check_range(name, value, low, high)


def _odd_ids(token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """All of them, unless all are ids: many are looked at in a millisecond so."""
    are_integers = set(map(type, token_ids)) <= {int}
    is_fine = are_integers and (not token_ids or (min(token_ids) >= 0 and max(token_ids) <= MAX_INT))
    return () if is_fine else token_ids


def _check_range(name: str, value: float, low: float, high: float, *, low_is_open: bool = False) -> None:
    if not isinstance(value, int | float):
        raise RequestError(f"{name} is {shown(repr(value))}; it must be a number")
    # Asked so that NaN, which is neither above nor below, is refused too.
    is_above_low = value > low if low_is_open else value >= low
    if not (is_above_low and value <= high):
        bounds = f"{'above' if low_is_open else 'at least'} {low}, at most {high}"
        raise RequestError(f"{name} is {shown(value)}; it must be {bounds}")


def _check_length(name: str, values: tuple[object, ...], most: int, unit: str) -> None:
    if not isinstance(values, tuple | list):
        raise RequestError(f"{name} is {shown(repr(values))}; it must be a list of {unit}")
    if len(values) > most:
        raise RequestError(f"{name} holds {len(values)} {unit}; at most {most} are allowed")


@dataclass(slots=True, eq=False)
class Request:
    """One sequence on its way through the engine; owned and changed by the scheduler alone.

    `num_computed_tokens` counts the prompt and output tokens whose keys and values are in the cache;
    `page_table` lists the cache pages that hold them, in order; `num_pending_tokens` counts output
    tokens that are being drawn on the device, not known here yet, and will be computed on.

    `block_hashes` name its full pages, first to last, as far as they are known. `num_cached_tokens` of its
    prompt were in the cache when it first started. Where it is not `is_cacheable`, every token is computed,
    and none is kept for others; nobody shares pages with requests of another `cache_salt`.

    Tokens before `adapter_start` are the base model's: an activated LoRA acts from there on.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter_id: int | None = None
    arrived_at: float = 0.0
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    page_table: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    num_pending_tokens: int = 0
    cache_salt: str | None = None
    is_cacheable: bool = True
    block_hashes: list[BlockHash] = field(default_factory=list)
    num_cached_tokens: int = 0
    adapter_start: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens + self.num_pending_tokens - self.num_computed_tokens

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens `start` to `stop` of prompt and output taken as one sequence, as far as they are known."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        return (
            self.prompt_token_ids[start:]
            + self.output_token_ids[max(0, start - num_prompt) : stop - num_prompt]
        )

    def scored_token_ids(self, num_tokens: int) -> list[int]:
        """Tokens of the prompt of which the next `num_tokens` rows are to tell how likely they were: those
        behind these rows, unless that has been told."""
        has_been_told = bool(self.output_token_ids or self.num_pending_tokens)
        if self.sampling.prompt_logprobs is None or has_been_told:
            return []
        start = self.num_computed_tokens + 1
        return self.prompt_token_ids[start : start + num_tokens]


@dataclass(slots=True)
class BatchItem:
    """`num_tokens` of a request's uncomputed tokens, to be run in this step. `stop`, set when it is
    committed: the request's computed tokens with them."""

    request: Request
    num_tokens: int
    stop: int = 0

    @property
    def is_decode(self) -> bool:
        """True for a single token that continues a sequence with earlier tokens in the cache."""
        return self.num_tokens == 1 and self.request.num_computed_tokens > 0

    @property
    def num_base_tokens(self) -> int:
        """Of its tokens, those that come before its adapter acts: all, where it has none."""
        request = self.request
        if request.adapter_id is None:
            return self.num_tokens
        return min(self.num_tokens, max(0, request.adapter_start - request.num_computed_tokens))

    @property
    def adapter_id(self) -> int | None:
        """Whose weights it needs, beside the base model's."""
        request = self.request
        if request.adapter_start >= request.num_computed_tokens + self.num_tokens:
            return None
        return request.adapter_id

    @property
    def is_last(self) -> bool:
        """True where this step computes the sequence's last token."""
        return self.num_tokens == self.request.num_uncomputed_tokens

    @property
    def needs_sample(self) -> bool:
        """True where a next token is to be drawn after this step."""
        return self.is_last and self.request.sampling.max_tokens > 0


@dataclass(slots=True)
class Batch:
    """One engine step: decodes first, each kind sorted by adapter, so that an adapter's rows are adjacent."""

    items: list[BatchItem]

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.items)


# --- messages: client to engine ---


@dataclass(frozen=True, slots=True)
class Begin:
    """The adapters that are registered at start are there: an engine may read the registry from now on."""


@dataclass(frozen=True, slots=True)
class AddRequest:
    """`cache_salt`, `is_cacheable`: as of `Request`. Raises RequestError for a salt that is empty, no valid
    Unicode or longer than `MAX_SALT_CHARS` characters."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter_id: int | None = None
    cache_salt: str | None = None
    is_cacheable: bool = True

    def __post_init__(self) -> None:
        salt = self.cache_salt
        if salt is None:
            return
        if not 1 <= len(salt) <= MAX_SALT_CHARS:
            raise RequestError(
                f"cache_salt has {len(salt)} characters; it must have between 1 and {MAX_SALT_CHARS}"
            )
        check_unicode("cache_salt", salt)


@dataclass(frozen=True, slots=True)
class AbortRequest:
    request_id: str


@dataclass(frozen=True, slots=True)
class RemoveAdapter:
    """Let the adapter's requests finish, then free its host and device memory; answered when that is done."""

    call_id: int
    adapter_id: int


@dataclass(frozen=True, slots=True)
class PinAdapter:
    """Keep an adapter on the device (loading it now) or let it be evicted again."""

    call_id: int
    adapter_id: int
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class GetStats:
    call_id: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Finish what is running, cut what is left after `deadline_s` seconds, then exit."""

    deadline_s: float


ToEngine = Begin | AddRequest | AbortRequest | RemoveAdapter | PinAdapter | GetStats | Shutdown


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message to the engine whose values are of other types than they should be: who is to be told, and
    what."""

    request_id: str | None
    call_id: int | None
    reason: str


# --- messages: engine to client ---


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probability of a chosen token, its rank (1 is the likeliest), and the best alternatives."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ColdStart:
    """What a cold request waited for, in ms; `tier` is where its adapter was when it arrived.

    `read_ms`: disk to host, `copy_ms`: host to device, `exposed_ms`: the part of both that the request itself
    waited for, `compute_ms`: its prefill steps less that wait.
    """

    tier: str  # "disk" or "host"
    read_ms: float
    copy_ms: float
    exposed_ms: float
    compute_ms: float


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of P tokens of a prompt, as packed numbers in the machine's order of bytes: natural-log probabilities
    of the tokens, float32 [P], their ranks, int32 [P] (1 is the likeliest), and the `num_top` likeliest
    tokens at each place, ids int32 [P, num_top] and log-probabilities float32 [P, num_top]."""

    num_top: int
    logprobs: bytes
    ranks: bytes
    top_ids: bytes
    top_logprobs: bytes

    @property
    def num_values(self) -> int:
        """Log-probabilities told."""
        return (len(self.logprobs) + len(self.top_logprobs)) // 4

    def tokens(self, token_ids: list[int]) -> list[TokenLogprobs]:
        """`token_ids`: the P tokens."""
        logprobs, top_logprobs = (
            memoryview(b).cast("f").tolist() for b in (self.logprobs, self.top_logprobs)
        )
        ranks, top_ids = (memoryview(b).cast("i").tolist() for b in (self.ranks, self.top_ids))
        k = self.num_top
        return [
            TokenLogprobs(
                token_id,
                logprobs[i],
                ranks[i],
                list(zip(top_ids[k * i : k * i + k], top_logprobs[k * i : k * i + k], strict=True)),
            )
            for i, token_id in enumerate(token_ids)
        ]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """New tokens of one request; the last one carries `finish_reason`, and `error` where that is ERROR.

    `prompt_logprobs`: of all tokens of the prompt but its first; `embedding`: of the prompt, float32 [hidden]
    in the machine's order of bytes, of length 1.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    queue_ms: float | None = None  # with the first token: arrival to first scheduled
    cold_start: ColdStart | None = None  # with the first token of a cold request
    num_cached_tokens: int | None = None  # with the first token: of its prompt, taken from the cache
    prompt_logprobs: PromptLogprobs | None = None  # with the first token, or the end
    embedding: bytes | None = None  # with the end


@dataclass(frozen=True, slots=True)
class StepOutputs:
    outputs: list[RequestOutput]


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a call; `error` is set where it could not be done."""

    call_id: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """Where one adapter is: `device_layers` of `num_layers` are resident, `num_running` requests use it."""

    adapter_id: int
    is_on_host: bool
    device_layers: int
    num_layers: int
    num_running: int
    num_waiting: int
    num_hits: int
    is_pinned: bool

    @property
    def is_anywhere(self) -> bool:
        """On host or device, or asked for."""
        return bool(self.is_on_host or self.device_layers or self.num_running or self.num_waiting)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for /stats, /metrics and routers. Lists of adapter ids are disjoint where they say so."""

    call_id: int
    num_running: int
    num_waiting: int
    kv_pages_used: int
    kv_pages_total: int
    page_size: int
    host_bytes_used: int
    host_bytes_total: int
    device_bytes_used: int
    device_bytes_total: int
    adapters: list[AdapterStatus]
    """Every adapter that is on host or device, or has requests; on their way between processes only those
    that have changed since the engine was last asked, also to nowhere."""
    running_ranks: list[int]  # max rank of each running request's adapter, 0 for the base model
    waiting_ranks: list[int]
    waiting_tokens: int  # prompt tokens not yet computed, over all waiting requests
    context_tokens: int  # tokens in the cache, over all running requests
    counters: dict[
        str, float
    ]  # monotonic: preemptions, hits and misses per tier, evictions, steps, tokens ...


@dataclass(frozen=True, slots=True)
class EngineReady:
    """First message of an engine: what it serves and with what limits."""

    model_name: str
    max_model_len: int
    max_num_seqs: int
    vocab_size: int
    page_size: int
    num_pages: int
    device_pool_bytes: int
    host_store_bytes: int
    decode_lora_form: str = ""  # of the kernels on a GPU
    hidden_size: int = 0  # of an embedding


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """Instead of EngineReady: why the engine could not start."""

    reason: str


FromEngine = StepOutputs | Reply | EngineStats | EngineReady | EngineFailed
