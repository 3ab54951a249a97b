"""The vocabulary that every room shares: projections, requests, batches.

Imports nothing of ours and no torch, so that the scheduler, the simulator and the router can use it bare.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import NamedTuple

from toppings.bad_input import MAX_INT, RequestError, shown
from toppings.sampling_params import SamplingParams

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections a LoRA may target, in the order every table and packed file uses."""

GROUPS: dict[str, tuple[int, ...]] = {"qkv": (0, 1, 2), "o": (3,), "gate_up": (4, 5), "down": (6,)}
"""Projection groups: indices into `MODULES` of the projections that read the same input."""
FUSED_MODULES: dict[str, tuple[int, ...]] = {"qkv_proj": GROUPS["qkv"], "gate_up_proj": GROUPS["gate_up"]}
"""Names that some checkpoints have for a group's projections as one, and what it is made of."""


def stored_modules(*, is_fused: bool, has_experts: bool) -> dict[str, tuple[int, ...]]:
    """Of a layer, by a module's name in checkpoints: the projections (`MODULES` indices) it is made of.
    Experts have others in the place of `gate_proj`, `up_proj` and `down_proj`."""
    own: dict[tuple[int, ...], str] = {(index,): name for index, name in enumerate(MODULES)}
    if is_fused:
        own = {(3,): "o_proj", (6,): "down_proj"} | {made: name for name, made in FUSED_MODULES.items()}
    return {
        f"{'self_attn' if made[0] < 4 else 'mlp'}.{name}": made
        for made, name in sorted(own.items())
        if made[0] < 4 or not has_experts
    }


class ExpertNames(NamedTuple):
    """A layer's modules by the names that the checkpoint gives them; {} is an expert's number. Where they
    `are_stacked`, a projection of all experts is one tensor [E, in, out], the outputs of gate and up take
    turns in one, and neither experts nor routers are modules that adapters may target. `router_parameter`:
    the router's weight by the name of transformers' class."""

    router: str = "mlp.gate"
    gate: str = "mlp.experts.{}.gate_proj"
    up: str = "mlp.experts.{}.up_proj"
    down: str = "mlp.experts.{}.down_proj"
    are_stacked: bool = False
    router_parameter: str = "mlp.gate.weight"


@dataclass(frozen=True)
class Mixture:
    """What a layer has of experts, each of the sizes of `gate_proj`, `up_proj` and `down_proj`."""

    num_experts: int
    num_per_token: int
    names: ExpertNames


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


@dataclass(frozen=True, slots=True)
class Standing:
    """Whose a request is, and how it stands beside others': what a tenant gets of a contended engine grows
    with its `weight`; of a lower `priority` is earlier, where the scheduling policy looks at it. One that
    `is_batch` takes what others leave (`slo.py`).

    Raises RequestError for a weight that is not above 0 and finite, or a priority beyond 64 bits.
    """

    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    is_batch: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise RequestError(f"weight is {self.weight}; it must be above 0 and finite")
        if not -MAX_INT <= self.priority <= MAX_INT:
            raise RequestError(
                f"priority is {shown(self.priority)}; it must be between {-MAX_INT} and {MAX_INT}"
            )

    @property
    def scheduling_priority(self) -> int:
        """By which it stands among others: batch requests behind all interactive ones."""
        return self.priority + BATCH_PRIORITY * self.is_batch


BATCH_PRIORITY = 2 * MAX_INT + 1
"""More than any two priorities are apart."""
ALONE = Standing()


@dataclass(slots=True, eq=False)
class Request:
    """One sequence on its way through the engine; owned and changed by the scheduler alone.

    `num_computed_tokens` counts the prompt and output tokens whose keys and values are in the cache;
    `page_table` lists the cache pages that hold them, in order; `num_pending_tokens` counts output
    tokens that are being drawn on the device, not known here yet, and will be computed on.

    `block_hashes` name its full pages, first to last, as far as they are known; `num_kept_tokens`, of those
    that are computed, were so by steps that have ended without a fault. `num_cached_tokens` of its
    prompt were in the cache when it first started. Where it is not `is_cacheable`, every token is computed,
    and none is kept for others; nobody shares pages with requests of another `cache_salt`.

    Tokens before `adapter_start` are the base model's: an activated LoRA acts from there on.

    `tenant`, `weight`, `priority`: of its `Standing`, the last its `scheduling_priority`. Where it was
    preempted, it makes way for another only when it has drawn `num_owed_tokens` more, by what its new
    start had to compute. It `was_drained` where it was preempted for another adapter, which is only once.
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
    num_kept_tokens: int = 0
    num_cached_tokens: int = 0
    adapter_start: int = 0
    vocab_size: int = 0
    end_token_ids: tuple[int, ...] = ()
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    num_owed_tokens: float = 0.0
    was_drained: bool = False

    @property
    def is_batch(self) -> bool:
        return self.priority > MAX_INT

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
    committed: the request's computed tokens with them. `copy_page`: before the step, what the request's page
    of the first of them holds of tokens before it is copied from there. `draft`: a guess at the tokens behind
    them, which are computed, too; a token is drawn behind each."""

    request: Request
    num_tokens: int
    stop: int = 0
    copy_page: int | None = None
    draft: Sequence[int] = ()

    @property
    def num_rows(self) -> int:
        return self.num_tokens + len(self.draft)

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
        return sum(item.num_rows for item in self.items)
