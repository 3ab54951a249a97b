"""One request and its answer: the id that both go by, who asked for what, and what became of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from toppings.tenants.account import Account
from toppings.tenants.book import TenantBook

CLIENT_GONE = 499
"""In place of a status where the client left before there was an answer."""
UNCOUNTED = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods of requests that no limit counts, and that change nothing."""
MESSAGES, MESSAGES_ID = "/v1/messages", "request-id"
"""Anthropic's routes, and the name that its clients look for the id under."""


@dataclass(slots=True)
class Exchange:
    """`account`: who asks, once they are let in; `key`: the id of their key, where it is one of the tenants
    file, and `owner`: the tenant whose it is, also where it has expired.

    What became of it: `status` of the answer (0: none was begun), `model` that was asked for, the `error`
    that ended it, and whose limit said no, such as the "tenant"'s (`rejected_by`). `started_at`: of
    `time.perf_counter`.
    """

    request_id: str
    path: str = ""
    method: str = ""
    client: str = ""
    account: Account | None = None
    key: str | None = None
    owner: str | None = None
    started_at: float = field(default_factory=time.perf_counter)
    status: int = 0
    model: str = ""
    has_adapter: bool = False
    error: str = ""
    rejected_by: str = ""

    @property
    def tenant(self) -> str | None:
        """ "" for the administrator, None for nobody that is known."""
        return self.owner if self.account is None else self.account.name

    def identify(
        self, book: TenantBook, authorization: bytes, plain: bytes, delegated: bytes | None
    ) -> Account:
        """Notes who asks, by the headers that `book.identify` takes. Raises as it does; whose key that was
        stays noted."""
        entry = book.key_of(authorization, plain)
        if entry is not None:
            self.key, self.owner = entry.id, entry.tenant
        self.account = book.identify(authorization, plain, delegated)
        return self.account

    @property
    def is_message(self) -> bool:
        """Whether it is in Anthropic's dialect."""
        return self.path.startswith(MESSAGES)

    @property
    def outcome(self) -> str:
        return outcome_by(self.status)

    @property
    def failure(self) -> str:
        """Why whoever answers has failed; empty where it has not. What a client does wrong, or that it left,
        is no failure of ours."""
        if 400 <= self.status < 500:
            return ""
        return self.error or (f"status {self.status}" if self.status >= 500 else "")

    @property
    def num_tokens(self) -> tuple[int, int] | None:
        """Of prompts that were started, and of answers; None where no tokens were asked for."""
        return None

    def measured(self) -> dict[str, Any]:
        """What its line in the request log has beyond what all have."""
        return {}


Observer = Callable[[Any], None]
"""Is told of each exchange when it is over."""


def outcome_by(status: int) -> str:
    """Of one without an answer: "rejected" (come back later), "refused" (its own fault), "abort" (the client
    left), or "error"."""
    if status == CLIENT_GONE:
        return "abort"
    if status == 429:
        return "rejected"
    return "refused" if 400 <= status < 500 else "error"
