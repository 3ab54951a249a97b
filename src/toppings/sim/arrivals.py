"""The requests of a trace one by one: as servers and as routers see them, and when they arrive."""

import math
from collections.abc import Sequence

import numpy as np

from toppings.cluster.snapshot import RequestSnapshot
from toppings.core import BATCH_PRIORITY
from toppings.sampling_params import SamplingParams
from toppings.settings import ConfigError
from toppings.sim.request import SimRequest
from toppings.sim.settings import NS_PER_S, SimConfig
from toppings.sim.trace import Trace

ANY = SamplingParams()
"""The scheduler reads no sampling parameters; how long a request runs stands in `SimRequest`."""


class Arrivals:
    """By index into the trace: `at_ns` of each request, and `nums_to_generate`, its response's tokens as far
    as `max_model_len` leaves room. By adapter: `adapter_names`, `adapter_bytes`.
    """

    def __init__(self, config: SimConfig, trace: Trace) -> None:
        self.at_ns: list[int] = [round(at * NS_PER_S) for at in trace.arrivals_s.tolist()]
        room = config.max_model_len - trace.prompt_tokens
        self.nums_to_generate: list[int] = np.maximum(1, np.minimum(trace.response_tokens, room)).tolist()
        self._ranks: list[int] = trace.ranks.tolist()
        bytes_of = {rank: config.adapter_bytes(rank) for rank in set(self._ranks)}  # one number of each size
        self.adapter_names, self.adapter_bytes = trace.adapter_names, [bytes_of[r] for r in self._ranks]
        self._instants = _instants(self.at_ns)
        self._adapters, self._prompts = trace.adapters.tolist(), trace.prompt_tokens.tolist()
        self._num_routers = config.num_routers
        shares = config.prefix_routing == "on" and config.enable_prefix_caching == "on"
        self._blocks = trace.blocks if shares else None
        self._owners, self._indices = [("", 1.0)], None
        if trace.tenants is not None:
            self._owners = list(zip(trace.tenants.names, trace.tenants.weights))
            self._indices = trace.tenants.indices.tolist()
        self._batch_tenants = frozenset(filter(None, config.batch_tenants.split(",")))
        unknown = self._batch_tenants - {name for name, _ in self._owners}
        if unknown:
            raise ConfigError(f"batch_tenants has {sorted(unknown)[0]!r}; the trace has no such tenant")

    def __len__(self) -> int:
        return len(self.at_ns)

    def request(self, index: int) -> SimRequest:
        """A new one each time: what a server makes of it stays there."""
        adapter = self._adapters[index]
        tenant, weight = self._owners[0 if self._indices is None else self._indices[index]]
        return SimRequest(
            str(index),
            range(self._prompts[index]),  # type: ignore[arg-type]  # its length is all that is ever asked
            ANY,
            adapter,
            self._instants[index],
            index=index,
            router=index % self._num_routers,
            rank=self._ranks[adapter],
            num_to_generate=self.nums_to_generate[index],
            tenant=tenant,
            weight=weight,
            priority=BATCH_PRIORITY * (tenant in self._batch_tenants),
        )

    def snapshot(self, request: SimRequest, response_tokens: float) -> RequestSnapshot:
        """What its router knows: `response_tokens` is a guess."""
        adapter, blocks = self._adapters[request.index], self._blocks
        return RequestSnapshot(
            request.request_id,
            self.adapter_names[adapter],
            request.rank,
            self._prompts[request.index],
            response_tokens,
            self.adapter_bytes[adapter],
            () if blocks is None else [(adapter, each) for each in blocks[request.index]],
            0.0 if blocks is None else blocks.block_len,
            is_batch=request.is_batch,
        )


def _instants(arrivals_ns: Sequence[int]) -> list[float]:
    """In seconds, no two alike: an engine sees none at one instant."""
    last, instants = -math.inf, []
    for at in arrivals_ns:
        last = max(at / NS_PER_S, math.nextafter(last, math.inf))
        instants.append(last)
    return instants
