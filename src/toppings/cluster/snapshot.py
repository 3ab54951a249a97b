"""What a routing policy is given and what it answers."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from toppings.cluster.perf_model import PerfModel


@dataclass(slots=True)
class RequestSnapshot:
    """One request as routing sees it; `response_tokens` is what it is expected to generate.

    `adapter` is None and `rank` 0 for the base model; `adapter_bytes` is 0 where the size is unknown.
    `blocks` name what its prompt begins with, `block_tokens` tokens each (`prefixes.py`); `cached_tokens` of
    it are believed to be on the server where it is, and are set by whoever counts it there. One that
    `is_batch` takes what others leave (`slo.py`). Nobody changes anything else; it is not frozen since one is
    made for every decision, and that would take four times longer.
    """

    request_id: str
    adapter: str | None
    rank: int
    prompt_tokens: int
    response_tokens: float
    adapter_bytes: int = 0
    blocks: Sequence[Hashable] = ()
    block_tokens: float = 0.0
    cached_tokens: int = 0
    is_batch: bool = False

    def __post_init__(self) -> None:
        if self.rank < 0 or self.prompt_tokens < 0 or self.response_tokens <= 0:
            raise ValueError(f"{self}: rank and prompt_tokens must be at least 0, response_tokens above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceSnapshot:
    """One server: what runs and waits there, which adapters it holds, and what it has room for.

    Limits are infinite where they are not known; of the device's room for adapters, `adapter_bytes_total`
    counts where it is known, else `max_adapters`. `kv_tokens_used` is what the server itself reported last.
    `is_open` is False while it is down, draining, or otherwise not to be given requests.
    """

    instance_id: str
    perf_model: PerfModel
    running: tuple[RequestSnapshot, ...] = ()
    waiting: tuple[RequestSnapshot, ...] = ()
    on_device: frozenset[str] = frozenset()
    on_host: frozenset[str] = frozenset()
    kv_tokens_total: float = math.inf
    kv_tokens_used: float = 0.0
    max_num_seqs: float = math.inf
    max_adapters: float = math.inf
    adapter_bytes_total: float = math.inf
    is_open: bool = True

    def __post_init__(self) -> None:
        for name in ("kv_tokens_total", "max_num_seqs", "max_adapters", "adapter_bytes_total"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"instance {self.instance_id!r}: {name} is {getattr(self, name)}, not above 0"
                )


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes: `row` into the instances that were given, and that instance's id.

    `breaks_slo` marks a request that no server could have taken within the objective.
    `predicted_tpt_ms` is the decode step it is expected to run in, `predicted_ttft_ms` the time until its
    first token; None where the policy predicts nothing.
    """

    row: int
    instance_id: str
    breaks_slo: bool = False
    predicted_tpt_ms: float | None = None
    predicted_ttft_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """A request that waits on one instance and should wait on another instead."""

    request_id: str
    source_id: str
    target_id: str
