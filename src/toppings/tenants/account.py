"""What a tenant has used of its limits: requests and tokens of the last minute, and what it has open.

Used from one event loop only. Requests and tokens are buckets that fill at the limit's rate and hold a
minute's worth. What a request says that its answer may have at most is reserved with its prompt; what of it
was not used is given back when the request ends. Tokens beyond are taken as they come, so that a bucket may
go below zero: what follows waits until that is made up, and over time no tenant has more than its rate.
"""

import math
import time
from collections import deque
from collections.abc import Callable

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


class Tally:
    """Places that are open, and their sequences that have had no token yet: counted, not looked through."""

    def __init__(self) -> None:
        self._num_open = self._num_waiting = 0
        self._dropped: deque[int] = deque()

    @property
    def num_open(self) -> int:
        self._catch_up()
        return self._num_open

    @property
    def num_waiting(self) -> int:
        self._catch_up()
        return self._num_waiting

    def add(self, num_open: int, num_waiting: int) -> None:
        self._num_open += num_open
        self._num_waiting += num_waiting

    def note_dropped(self, num_waiting: int) -> None:
        """One less; from any thread, since the collector runs in any."""
        self._dropped.append(num_waiting)

    def _catch_up(self) -> None:
        while self._dropped:
            self.add(-1, -self._dropped.popleft())


class Place:
    """One request that is open, left by `leave` or by being dropped; `num_waiting` of its sequences have had
    no token yet. `reserved_tokens`, taken with its prompt, are left for its answer."""

    def __init__(self, account: "Account", num_waiting: int, *tallies: Tally) -> None:
        self.account, self.num_waiting = account, num_waiting
        self.prompt_tokens, self.answer_tokens = 0, 0  # that were counted
        self.reserved_tokens = 0
        self._is_open, self._tallies = True, tallies
        for tally in tallies:
            tally.add(1, num_waiting)

    def start(self) -> None:
        self.num_waiting -= 1
        for tally in self._tallies if self._is_open else ():
            tally.add(0, -1)

    def take(self, prompt_tokens: int, max_answer_tokens: int = 0) -> None:
        """Those of the prompt, and what is reserved for the answer. Raises Refusal 429 where they are too
        many."""
        if self.account.take_tokens(prompt_tokens + max_answer_tokens):
            self.reserved_tokens = max_answer_tokens
        self.prompt_tokens = prompt_tokens

    def spend(self, num_tokens: int) -> None:
        """Of the answer; those that were counted too many are negative."""
        num_reserved = max(0, min(num_tokens, self.reserved_tokens))
        self.reserved_tokens -= num_reserved
        self.answer_tokens += num_tokens
        self.account.spend(num_tokens - num_reserved)

    def settle(self, prompt_tokens: int | None, answer_tokens: int | None) -> None:
        """What they were, in place of what was counted; None where that is not known."""
        if prompt_tokens is not None:
            self.account.spend(prompt_tokens - self.prompt_tokens)
            self.prompt_tokens = prompt_tokens
        if answer_tokens is not None:
            self.spend(answer_tokens - self.answer_tokens)

    def leave(self) -> None:
        """What was reserved and not used is given back."""
        if self._is_open:
            self._is_open = False
            for tally in self._tallies:
                tally.add(-1, -self.num_waiting)
            self.release()

    def release(self) -> None:
        self.account.spend(-self.reserved_tokens)
        self.reserved_tokens = 0

    def __del__(self) -> None:
        if self._is_open:
            for tally in self._tallies:
                tally.note_dropped(self.num_waiting)


class Account:
    """`tenant` may change while it is used: what is used already counts against the new limits."""

    def __init__(self, tenant: Tenant, clock: Callable[[], float] = time.monotonic) -> None:
        self.tenant, self._clock = tenant, clock
        self._tally = Tally()
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

    def take_tokens(self, num_tokens: int) -> bool:
        """Counts them, where they are limited. Raises Refusal 429 where they are too many."""
        if limit := self.tenant.tokens_per_minute:
            now = self._clock()
            self._check(self._tokens, num_tokens, limit, TOKENS, now)
            self._tokens.spend(num_tokens, limit, now)
        return bool(limit)

    def spend(self, num_tokens: int) -> None:
        """Counts tokens that have been made already."""
        if limit := self.tenant.tokens_per_minute:
            self._tokens.spend(num_tokens, limit, self._clock())

    @property
    def num_open(self) -> int:
        """Its requests."""
        return self._tally.num_open

    @property
    def num_waiting(self) -> int:
        """Sequences of its requests that have had no token yet."""
        return self._tally.num_waiting

    def enter(self, num_sequences: int, *tallies: Tally, max_queue: int = 0) -> Place:
        """A place for a request, which counts in these `tallies`, too; `max_queue` counts where the tenant's
        own is 0. Raises Refusal 429."""
        tenant = self.tenant
        num_open, max_queue = self.num_open, tenant.max_queue or max_queue
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
        return Place(self, num_sequences, self._tally, *tallies)

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
