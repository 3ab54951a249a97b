"""What a server tells of itself, for whoever sends it requests.

A Toppings server makes one for `/stats`, a replica for Serve (both in `server/report.py`), a simulated server
for its router; what other servers tell is translated into one (`router/metrics_text.py`).
"""

import math
from collections import Counter
from collections.abc import Set
from typing import Any

import msgspec

from toppings.cluster.perf_model import PerfModel

MAX_RANK = 2**16


class RequestEntry(msgspec.Struct, array_like=True):
    """A request that a server has; it waits while it has generated nothing."""

    request_id: str
    adapter: str | None
    rank: int
    prompt_tokens: int
    num_generated: int


class LeftEntry(msgspec.Struct, array_like=True):
    """A request whose client left before its end. A server's `number` grows, also from one start to the next;
    `prompt_tokens` is None where it had several sequences."""

    number: int
    tenant: str
    request_id: str
    prompt_tokens: int | None
    answer_tokens: int


class ServerReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One reading. `None` where nobody tells: of limits, that they are unknown; of adapters, no news.

    `running_ranks` and `waiting_ranks` have one entry per request; `requests` are told by those whose ids are
    the router's. `left` are the latest whose clients have gone. Without ranks `on_device` need not be all of
    them, and `in_use` are the adapters with requests. `perf_model` is JSON, since it may be of another
    version.
    """

    num_running: int
    num_waiting: int
    running_ranks: list[int] | None
    waiting_ranks: list[int] | None
    kv_tokens_total: float | None
    kv_tokens_used: float
    max_num_seqs: float | None = None
    max_adapters: float | None = msgspec.field(default=None, name="max_lora")
    adapter_bytes_total: float | None = None
    on_device: Set[str] | None
    on_host: Set[str] | None
    in_use: Set[str] = frozenset()
    requests: list[RequestEntry] | None = None
    left: list[LeftEntry] = []
    perf_model: Any = None

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no server has."""
        if self.num_running < 0 or self.num_waiting < 0:
            raise ValueError(f"it tells of {self.num_running} and {self.num_waiting} requests")
        for ranks in (self.running_ranks, self.waiting_ranks):
            if ranks and not 0 <= min(ranks) <= max(ranks) <= MAX_RANK:
                raise ValueError(f"it tells of requests of ranks {min(ranks)} to {max(ranks)}")
        for limit in (self.kv_tokens_total, self.max_num_seqs, self.max_adapters, self.adapter_bytes_total):
            if limit is not None and not limit > 0:
                raise ValueError(f"it tells of a limit of {limit}; it must be above 0")
        if not 0 <= self.kv_tokens_used < math.inf:
            raise ValueError(f"it tells of {self.kv_tokens_used} tokens in use")

    @property
    def num_requests(self) -> int:
        return self.num_running + self.num_waiting

    @property
    def ranks(self) -> Counter[int] | None:
        """Running and waiting requests of each rank."""
        if self.running_ranks is None or self.waiting_ranks is None:
            return None
        return Counter(self.running_ranks + self.waiting_ranks)

    def read_perf_model(self) -> PerfModel | None:
        """None, too, for one that cannot be read: the configured one serves."""
        try:
            return None if self.perf_model is None else msgspec.convert(self.perf_model, PerfModel)
        except ValueError:
            return None


read_report = msgspec.json.Decoder(ServerReport).decode
"""From the body of `/stats`. Raises ValueError where it is not a Toppings server's."""
