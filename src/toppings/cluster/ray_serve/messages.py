"""What travels between the front, the request router and the replicas; nothing here needs Ray."""

from dataclasses import dataclass, field

from toppings.adapters.registry import AdapterRecord
from toppings.cluster.snapshot import RequestSnapshot
from toppings.core import ALONE, Standing
from toppings.messages import AdapterStatus, EngineStats
from toppings.sampling_params import SamplingParams

SIGN_OF_LIFE = ""
"""What a replica sends for a request that has no new tokens, every `SIGN_PERIOD_S`."""
SIGN_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One generation of an adapter as the front has it registered: `generation` is its id there.

    A replica finds it by name and digest in the registry of its own machine, or registers it from `path`.
    `rank`: what it counts for in a step.
    """

    generation: int
    name: str
    path: str
    digest: str
    rank: int
    num_bytes: int
    is_pinned: bool = False

    @classmethod
    def of(cls, record: AdapterRecord) -> "AdapterRef":
        return cls(
            generation=record.adapter_id,
            name=record.name,
            path=record.path,
            digest=record.digest,
            rank=record.step_rank,
            num_bytes=record.num_bytes,
            is_pinned=record.is_pinned,
        )


@dataclass(frozen=True, slots=True)
class Call:
    """One request for tokens. The request router reads `snapshot` and `avoid`, the replica the rest.

    `request_id` is `origin` and a number; the origin tells a router its own requests from others'. `avoid`
    are replicas on which the request has failed already. The request router notes in `sent_to` where the call
    went, for the front, whose object it is. `http_id` is what the client knows its request by.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapter: AdapterRef | None
    response_tokens: float
    avoid: frozenset[str] = frozenset()
    sent_to: list[str] = field(default_factory=list)
    cache_salt: str | None = None
    standing: Standing = ALONE
    http_id: str = ""

    @property
    def origin(self) -> str:
        return origin_of(self.request_id)

    @property
    def snapshot(self) -> RequestSnapshot:
        adapter = self.adapter
        return RequestSnapshot(
            request_id=self.request_id,
            adapter=adapter.name if adapter else None,
            rank=adapter.rank if adapter else 0,
            prompt_tokens=len(self.prompt_token_ids),
            response_tokens=self.response_tokens,
            adapter_bytes=adapter.num_bytes if adapter else 0,
        )


def origin_of(request_id: str) -> str:
    return request_id.partition("-")[0]


@dataclass(frozen=True, slots=True)
class Ack:
    """What an administrative call did on a replica; `error` says why it was not done."""

    replica_id: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One engine's statistics, for `/stats`, `/metrics` and `/replicas`; adapters by their names."""

    replica_id: str
    node_id: str
    stats: EngineStats
    adapters: list[tuple[str, AdapterStatus]]
