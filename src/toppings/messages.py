"""What engines and their clients, in different processes, send each other."""

from dataclasses import dataclass, field

from toppings.bad_input import RequestError, check_unicode
from toppings.core import ALONE, MAX_SALT_CHARS, FinishReason, Standing
from toppings.sampling_params import SamplingParams

# --- client to engine ---


@dataclass(frozen=True, slots=True)
class Begin:
    """The adapters that are registered at start are there: an engine may read the registry from now on."""


@dataclass(frozen=True, slots=True)
class AddRequest:
    """`cache_salt`, `is_cacheable`: as of `Request`. Raises RequestError for a salt that
    `check_salt` refuses."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter_id: int | None = None
    cache_salt: str | None = None
    is_cacheable: bool = True
    standing: Standing = ALONE

    def __post_init__(self) -> None:
        check_salt(self.cache_salt)


def check_salt(salt: str | None) -> None:
    """Raises RequestError for a salt that is empty, no valid Unicode or longer than `MAX_SALT_CHARS`
    characters."""
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
class PrefetchAdapter:
    """Read the adapter into host memory, since requests for it are about to come."""

    call_id: int
    adapter_id: int


@dataclass(frozen=True, slots=True)
class GetStats:
    call_id: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Finish what is running, cut what is left after `deadline_s` seconds, then exit."""

    deadline_s: float


ToEngine = (
    Begin | AddRequest | AbortRequest | RemoveAdapter | PinAdapter | PrefetchAdapter | GetStats | Shutdown
)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message to the engine whose values are of other types than they should be: who is to be told, and
    what."""

    request_id: str | None
    call_id: int | None
    reason: str


# --- engine to client ---


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probability of a chosen token, its rank (1 is the likeliest), and the best alternatives, or
    the tokens that the request names."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Span:
    """From when to when, in ms after a request's arrival; below 0 where it came about for an earlier one."""

    from_ms: float
    to_ms: float

    @property
    def ms(self) -> float:
        return self.to_ms - self.from_ms


@dataclass(frozen=True, slots=True)
class ColdLayer:
    """One layer of a cold request's adapter, up to its first token.

    `load`: its copy from host to device, None where it had not landed by then. Products are those of a
    projection group in a prefill step; `num_cpu_products` of `num_products` were computed by CPU workers, in
    `num_slices` pieces between the two instants of `cpu`, the others on the device. On a GPU, `cpu` is when
    they were queued.
    """

    load: Span | None
    num_products: int
    num_cpu_products: int = 0
    num_slices: int = 0
    cpu: Span | None = None

    @property
    def place(self) -> str:
        """Where its products were computed: "device", "cpu", "both", or "none" where it has none."""
        if not self.num_products:
            return "none"
        if not self.num_cpu_products:
            return "device"
        return "cpu" if self.num_cpu_products >= self.num_products else "both"


@dataclass(frozen=True, slots=True)
class ColdStep:
    """A step with `num_tokens` of a cold request's prompt. `load_wait_ms` of it were waits for adapters."""

    span: Span
    num_tokens: int
    load_wait_ms: float


@dataclass(frozen=True, slots=True)
class ColdStart:
    """What a cold request waited for, in ms; `tier` is where its adapter was when it arrived.

    `read_ms`: disk to host, `copy_ms`: host to device, `exposed_ms`: the part of both that the request itself
    waited for, `compute_ms`: its prefill steps less that wait.

    Its course: `arrived_at` the engine (Unix time, s), `queue_ms` until its first step, `first_token_ms`
    until its first token; the `read` from disk, where there was one; each layer; its prefill steps, of which
    the last one stands for all beyond `MAX_COLD_STEPS`.
    """

    tier: str  # "disk" or "host"
    read_ms: float
    copy_ms: float
    exposed_ms: float
    compute_ms: float
    adapter_id: int = 0
    rank: int = 0
    num_bytes: int = 0
    arrived_at: float = 0.0
    queue_ms: float = 0.0
    first_token_ms: float = 0.0
    read: Span | None = None
    layers: list[ColdLayer] = field(default_factory=list)
    steps: list[ColdStep] = field(default_factory=list)


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
    is_folded: bool = False  # into the base model's weights, in part at least

    @property
    def is_anywhere(self) -> bool:
        """On host or device, or asked for."""
        return bool(self.is_on_host or self.device_layers or self.num_running or self.num_waiting)


@dataclass(frozen=True, slots=True)
class MergedStatus:
    """Of merged mode: the adapter that is folded into the base model's weights, or on its way there or back:
    so many of its `num_groups`, projection groups of all layers, are. `kept_bytes` of host memory hold the
    weights as they were. `share`: of the rows of late steps, of it or else of the adapter that has most;
    `gain`: the share of the steps' time that folding that one saves or would save, as far as it is measured.
    """

    adapter_id: int | None
    num_folded: int
    num_groups: int
    kept_bytes: int
    share: float
    gain: float


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
    num_workers: int = 0  # processes of CPU assistance that are alive
    merged: MergedStatus | None = None  # where merged mode is on


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
