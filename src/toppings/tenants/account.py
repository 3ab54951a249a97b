"""What a tenant has used of its limits: requests and tokens of the last minute, and what it has open.

Used from one event loop only. Requests and tokens are buckets that fill at the limit's rate and hold a
minute's worth. An answer's tokens are taken as they come, so that a bucket may go below zero: what follows
waits until that is made up, and over time no tenant has more than its rate.
"""

import math
import time
from collections.abc import Callable
from weakref import WeakSet

from toppings.tenants.refusals import duration, limited
from toppings.tenants.tenant import Tenant

REQUESTS, TOKENS = "requests", "tokens"
WAIT_S = 1.0
"""After which it is worth asking again where something else has to end first."""


class Bucket:
    """`per_minute` may be another one each time; `level` is what is left. `now` in seconds."""

    def __init__(self, now: float) -> None:
        self._level, self._per_minute, self._at = 0.0, 0, now

    def level(self, per_minute: int, now: float) -> float:
        self._level = min(per_minute, self._level + (now - self._at) * per_minute / 60)
        if per_minute != self._per_minute:  # a larger one begins with what it has more
            self._level = min(per_minute, self._level + max(0, per_minute - self._per_minute))
            self._per_minute = per_minute
        self._at = now
        return self._level

    def spend(self, amount: float, per_minute: int, now: float) -> None:
        self._level = self.level(per_minute, now) - amount

    def wait_s(self, amount: float, per_minute: int, now: float) -> float:
        """Until `amount` is there; 0 where it is, infinite where it never will be."""
        if amount > per_minute:
            return math.inf
        return max(0.0, amount - self.level(per_minute, now)) * 60 / per_minute


class Place:
    """One request that is open, left by `leave` or by being dropped; `num_waiting` of its sequences have had
    no token yet."""

    def __init__(self, account: "Account", num_waiting: int) -> None:
        self.account, self.num_waiting = account, num_waiting
        self.prompt_tokens, self.answer_tokens = 0, 0  # that were counted

    def start(self) -> None:
        self.num_waiting -= 1

    def take_prompt(self, num_tokens: int) -> None:
        """Raises Refusal 429 where they are too many."""
        self.account.take_tokens(num_tokens)
        self.prompt_tokens = num_tokens

    def spend(self, num_tokens: int) -> None:
        """Of the answer."""
        self.answer_tokens += num_tokens
        self.account.spend(num_tokens)

    def settle(self, prompt_tokens: int | None, answer_tokens: int | None) -> None:
        """What they were, in place of what was counted; None where that is not known."""
        prompt = self.prompt_tokens if prompt_tokens is None else prompt_tokens
        answer = self.answer_tokens if answer_tokens is None else answer_tokens
        self.account.spend(prompt + answer - self.prompt_tokens - self.answer_tokens)
        self.prompt_tokens, self.answer_tokens = prompt, answer

    def leave(self) -> None:
        self.account.places.discard(self)


class Account:
    """`tenant` may change while it is used: what is used already counts against the new limits."""

    def __init__(self, tenant: Tenant, clock: Callable[[], float] = time.monotonic) -> None:
        self.tenant, self._clock = tenant, clock
        self.places: WeakSet[Place] = WeakSet()
        now = clock()
        self._requests, self._tokens = Bucket(now), Bucket(now)

    @property
    def name(self) -> str:
        return self.tenant.name

    def take_request(self) -> None:
        """Counts one request. Raises Refusal 429 where it is one too many, or tokens are owed."""
        now, tenant = self._clock(), self.tenant
        if limit := tenant.tokens_per_minute:
            self._check(self._tokens, 1, limit, TOKENS, now)
        if limit := tenant.requests_per_minute:
            self._check(self._requests, 1, limit, REQUESTS, now)
            self._requests.spend(1, limit, now)

    def take_tokens(self, num_tokens: int) -> None:
        """Counts those of a prompt. Raises Refusal 429 where they are too many."""
        if limit := self.tenant.tokens_per_minute:
            now = self._clock()
            self._check(self._tokens, num_tokens, limit, TOKENS, now)
            self._tokens.spend(num_tokens, limit, now)

    def spend(self, num_tokens: int) -> None:
        """Counts tokens that have been made already."""
        if limit := self.tenant.tokens_per_minute:
            self._tokens.spend(num_tokens, limit, self._clock())

    @property
    def num_waiting(self) -> int:
        """Sequences of its requests that have had no token yet."""
        return sum(place.num_waiting for place in self.places)

    def enter(self, num_sequences: int, *, max_queue: int = 0) -> Place:
        """A place for a request; `max_queue` counts where the tenant's own is 0. Raises Refusal 429."""
        tenant = self.tenant
        num_open, max_queue = len(self.places), tenant.max_queue or max_queue
        if tenant.max_requests and num_open >= tenant.max_requests:
            raise limited(
                tenant.name,
                "requests at once",
                REQUESTS,
                limit=tenant.max_requests,
                used=num_open,
                requested=1,
                wait_s=WAIT_S,
            )
        if max_queue:
            num_waiting = self.num_waiting
            if num_waiting + num_sequences > max_queue:
                wait_s = math.inf if num_sequences > max_queue else WAIT_S
                raise limited(
                    tenant.name,
                    "sequences that wait",
                    REQUESTS,
                    limit=max_queue,
                    used=num_waiting,
                    requested=num_sequences,
                    wait_s=wait_s,
                )
        place = Place(self, num_sequences)
        self.places.add(place)
        return place

    def headers(self) -> dict[str, str]:
        """What is left, as OpenAI's clients read it; nothing where there are no limits."""
        tenant, now = self.tenant, self._clock()
        told: dict[str, str] = {}
        for kind, bucket, limit in (
            (REQUESTS, self._requests, tenant.requests_per_minute),
            (TOKENS, self._tokens, tenant.tokens_per_minute),
        ):
            if limit:
                level = bucket.level(limit, now)
                told[f"x-ratelimit-limit-{kind}"] = str(limit)
                told[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(level)))
                told[f"x-ratelimit-reset-{kind}"] = duration((limit - level) * 60 / limit)
        return told

    def _check(self, bucket: Bucket, amount: int, limit: int, kind: str, now: float) -> None:
        if wait_s := bucket.wait_s(amount, limit, now):
            what = f"{kind} per min ({'RPM' if kind == REQUESTS else 'TPM'})"
            used = max(0, math.ceil(limit - bucket.level(limit, now)))
            raise limited(self.name, what, kind, limit=limit, used=used, requested=amount, wait_s=wait_s)
