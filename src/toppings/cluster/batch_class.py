"""Batch requests (`slo.py`) in a fleet: where there is room for one, and those that wait for some."""

import math
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from toppings.cluster.policies.base import PolicySettings
from toppings.cluster.snapshot import Choice

BATCH_SHARE = 0.8
"""Of the objectives, that a server to which a batch request is sent may come to by it."""
MAX_TRIED = 8
"""Models for which a place is looked for at once, in turn; the others are next."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Booking:
    """Of a server's latest batch request: since when, and what share of its time prompts have."""

    request_id: str
    at: float
    share: float


class SpareTime:
    """What servers have left for batch requests. A decode step with the request's sequence, and the time
    until its first token, have to stay within `BATCH_SHARE` of the objectives. Its prompt holds up the tokens
    of all that run there: prompts of batch requests get the share of a server's time that decode steps leave,

        1 - TPT / (BATCH_SHARE x slo_tpt_ms)

    so that after one of p ms the next may come p / share later. Without requests a server has all its time.
    """

    def __init__(self, settings: PolicySettings, ticks_per_s: float) -> None:
        self._slo_tpt_ms = BATCH_SHARE * settings.slo_tpt_ms
        self._slo_ttft_ms = BATCH_SHARE * settings.slo_ttft_ms
        self._has_objectives = math.isfinite(self._slo_tpt_ms) or math.isfinite(self._slo_ttft_ms)
        self._ticks_per_ms = ticks_per_s / 1e3
        self._next_at: dict[str, float] = {}
        self._booked: dict[str, _Booking] = {}  # by server

    def take(self, request_id: str, choice: Choice, num_requests: float, now: float) -> bool:
        """Whether there is room where the policy would send one, beside so many requests; then it is taken.
        There is room anywhere without objectives, and for policies that predict nothing.
        """
        tpt_ms, ttft_ms, server = choice.predicted_tpt_ms, choice.predicted_ttft_ms, choice.instance_id
        if not self._has_objectives or tpt_ms is None or ttft_ms is None:
            return True
        is_due = now >= self._next_at.get(server, now)
        is_within = tpt_ms < self._slo_tpt_ms and ttft_ms <= self._slo_ttft_ms
        if num_requests and not (is_due and is_within):
            return False
        share = max(1.0 - tpt_ms / self._slo_tpt_ms, 1.0 - BATCH_SHARE)
        self._next_at[server] = now + (ttft_ms - tpt_ms) / share * self._ticks_per_ms
        self._booked[server] = _Booking(request_id, now, share)
        return True

    def ended(self, request_id: str, instance_id: str, now: float) -> None:
        """Its prompt took no longer than it was there: what was booked beyond that is given back."""
        booking = self._booked.get(instance_id)
        if booking is not None and booking.request_id == request_id:
            taken_at = booking.at + (now - booking.at) / booking.share
            self._next_at[instance_id] = min(self._next_at[instance_id], taken_at)
            del self._booked[instance_id]

    def forget(self, instance_id: str) -> None:
        self._next_at.pop(instance_id, None)
        self._booked.pop(instance_id, None)


@dataclass(slots=True, eq=False)
class _Tenant(Generic[T]):
    """What one tenant has waiting, by model; `credit`: requests that it may place in its turn."""

    weight: float
    credit: float = 0.0
    models: dict[Hashable, dict[T, None]] = field(default_factory=dict)
    num_requests: int = 0


class Held(Generic[T]):
    """Batch requests that wait for room: of a tenant's model in the order they came, its models in turn, and
    tenants in turn by their weights (deficit round robin, Shreedhar and Varghese, SIGCOMM 1995). So nobody
    waits behind another's requests, nor behind those for a model that has no room.
    """

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant[T]] = {}
        self._turns: deque[str] = deque()

    def __len__(self) -> int:
        return sum(tenant.num_requests for tenant in self._tenants.values())

    def num_of(self, tenant: str) -> int:
        found = self._tenants.get(tenant)
        return 0 if found is None else found.num_requests

    def has(self, tenant: str, model: Hashable) -> bool:
        """Whether others of the tenant's wait for this model."""
        found = self._tenants.get(tenant)
        return found is not None and model in found.models

    def add(self, request: T, tenant: str, model: Hashable, weight: float = 1.0) -> None:
        found = self._tenants.get(tenant)
        if found is None:
            found = self._tenants[tenant] = _Tenant(weight)
            self._turns.append(tenant)
        found.weight = weight
        found.models.setdefault(model, {})[request] = None
        found.num_requests += 1

    def discard(self, request: T, tenant: str, model: Hashable) -> None:
        found = self._tenants.get(tenant)
        if found is None or request not in found.models.get(model, ()):
            return
        del found.models[model][request]
        found.num_requests -= 1
        if not found.models[model]:
            del found.models[model]
        if not found.models:
            del self._tenants[tenant]
            self._turns.remove(tenant)

    def pop_all(self) -> list[T]:
        requests = [
            each for tenant in self._tenants.values() for model in tenant.models.values() for each in model
        ]
        self._tenants.clear()
        self._turns.clear()
        return requests

    def look(self, place: Callable[[T], bool]) -> None:
        """There may be room: `place` says whether it has found some for a request, which is then let go. It
        goes on until all have been asked without one being placed, or `MAX_TRIED` models have no room.
        """
        num_left, num_idle = MAX_TRIED, 0
        most = max((tenant.weight for tenant in self._tenants.values()), default=1.0)
        while num_left > 0 and num_idle < len(self._turns):
            name = self._turns[0]
            self._turns.rotate(-1)
            tenant = self._tenants[name]
            tenant.credit = min(1.0, tenant.credit + tenant.weight / most)
            num_before = tenant.num_requests
            for model in list(islice(tenant.models, num_left)):
                num_left -= not self._place_all(name, tenant, model, place)
            num_idle = num_idle + 1 if tenant.num_requests == num_before else 0
            if num_idle == len(self._turns):  # who has no credit yet gets what others cannot use
                for each in self._tenants.values():
                    num_idle = 0 if each.credit < 1.0 else num_idle
                    each.credit = 1.0

    def _place_all(self, name: str, tenant: _Tenant[T], model: Hashable, place: Callable[[T], bool]) -> bool:
        """Requests for one model, while there is credit; False where one has found no room."""
        while tenant.credit >= 1.0 and model in tenant.models:
            request = next(iter(tenant.models[model]))
            if not place(request):
                if model in tenant.models:  # the tenant's other models come first next time
                    tenant.models[model] = tenant.models.pop(model)
                return False
            tenant.credit -= 1.0
            self.discard(request, name, model)
        return True
