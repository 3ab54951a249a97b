"""Which of those that run make room for others: batch requests for interactive ones, else those of one tenant
for another's, never for its own.

A tenant's share of places and of pages is by its weight among those that have requests. One that holds less
may start a request at the cost of those that hold more, who are left their shares: at once where it asks for
no more than its share, else where it is so far behind in service that computing the other's tokens again is
little beside it. A request that has made way does so again only when it has drawn sixteen times as many
tokens as its new start had to compute, a batch request once as many: so little is computed again.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from toppings.core import Request
from toppings.engine.fair_clients import Client
from toppings.engine.fair_queue import FairQueue

LAG_PER_TOKEN = 2.0
"""Tokens of service by which a tenant that asks for more than its share is behind another, for each that a
request of the other would have to compute again."""


def victims_for(
    request: Request,
    running: Sequence[Request],
    queue: FairQueue,
    *,
    num_seqs: int,
    num_pages: int,
    max_num_seqs: int,
    max_num_pages: int,
    num_pages_of: Callable[[Request], int],
    spared: Collection[Request] = (),
) -> list[Request]:
    """Of `running`, ordered by arrival, those that make `num_seqs` places and `num_pages` pages for
    `request`, the last to arrive first; empty where it has no claim to them."""
    if not request.is_batch:
        batch = _batch_among(running, num_seqs, num_pages, num_pages_of, spared)
        if batch:
            return batch
    if not queue.has_several_tenants:
        return []
    mine = queue.tenant_of(request)
    share = queue.share_of(mine)
    if mine.num_running and mine.num_running + 1 > share * max_num_seqs:
        return []
    # Places alone are looked at far more often, and counted already.
    pages = _pages_of(running, queue, num_pages_of) if mine.num_running or num_pages > 0 else Counter()
    if mine.num_running and pages[mine] + num_pages > share * max_num_pages:
        return []
    is_guest = not mine.num_running or queue.is_guest(request)
    num_seqs_of: dict[Client, int] = {}  # of those that make way
    victims: list[Request] = []
    for other in reversed(running):
        if num_seqs <= 0 and num_pages <= 0:
            break
        if other.num_owed_tokens or other.priority < request.priority:
            continue
        tenant = queue.tenant_of(other)
        num_left = tenant.num_running - num_seqs_of.get(tenant, 0) - 1
        if num_pages <= 0 and not num_left:
            continue
        share = queue.share_of(tenant)
        leaves_seqs = num_seqs > 0 and num_left >= share * max_num_seqs
        if (not leaves_seqs and num_pages <= 0) or tenant is mine or other in spared:
            continue
        lag = (tenant.served - mine.served) * mine.weight
        if not is_guest and lag < LAG_PER_TOKEN * queue.num_lost(other):
            continue
        num_freed = num_pages_of(other)
        leaves_pages = num_pages > 0 and pages[tenant] - num_freed >= share * max_num_pages
        if leaves_seqs or leaves_pages:
            victims.append(other)
            num_seqs_of[tenant] = num_seqs_of.get(tenant, 0) + 1
            pages[tenant] -= num_freed
            num_seqs, num_pages = num_seqs - 1, num_pages - num_freed
    return victims if num_seqs <= 0 and num_pages <= 0 else []


def _batch_among(
    running: Sequence[Request],
    num_seqs: int,
    num_pages: int,
    num_pages_of: Callable[[Request], int],
    spared: Collection[Request],
) -> list[Request]:
    """The batch requests that make way, the last to arrive first; empty where they are not enough."""
    victims: list[Request] = []
    for other in reversed(running):
        if num_seqs <= 0 and num_pages <= 0:
            break
        if other.is_batch and not other.num_owed_tokens and other not in spared:
            victims.append(other)
            num_seqs, num_pages = num_seqs - 1, num_pages - num_pages_of(other)
    return victims if num_seqs <= 0 and num_pages <= 0 else []


def last_of(running: Sequence[Request], queue: FairQueue, num_pages_of: Callable[[Request], int]) -> Request:
    """Who gives its pages back where they have run out for those that run: of the least urgent, the last to
    arrive; among tenants, of the one that holds most for its weight, if it may make way (again)."""
    worst = max(request.priority for request in running)
    urgent = [request for request in running if request.priority == worst]
    free = [request for request in urgent if not request.num_owed_tokens]
    if not queue.has_several_tenants or not free:
        return urgent[-1]
    pages = _pages_of(running, queue, num_pages_of)

    def excess(request: Request) -> float:
        tenant = queue.tenant_of(request)
        return pages[tenant] / tenant.weight

    most = max(map(excess, free))
    return next(request for request in reversed(free) if excess(request) == most)


def _pages_of(
    running: Sequence[Request], queue: FairQueue, num_pages_of: Callable[[Request], int]
) -> Counter[Client]:
    pages: Counter[Client] = Counter()
    for request in running:
        pages[queue.tenant_of(request)] += num_pages_of(request)
    return pages
