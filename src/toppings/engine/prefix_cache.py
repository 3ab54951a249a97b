"""Requests that begin alike: what they share of the key-value cache, and who waits for whom to compute it.

Blocks are full pages with a name (`pages.py`). A request's are named when it is queued, those of its output
as they fill, and kept once the step that filled them has run without a fault. Its last page, which is not
full, is kept when it ends: whoever begins with all its tokens starts with a copy of it.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

from toppings.core import BatchItem, BlockHash, Request
from toppings.engine.pages import PageAllocator

MAX_LEAD_S = 1.0
"""A request all of whose tokens are in the cache counts as arrived by so much earlier, others by a share."""
NUM_ORDERED = 64
"""Requests at the head of the queue that are looked at for this."""
MAX_WAIT_S = 5.0
"""How long a request waits at most for others to compute tokens that it begins with, too."""
MUCH_TOKENS = 256
"""It waits for as many of them, or for half of what it has to compute."""


class BlockNames(Protocol):
    """How blocks are named (`block_hashes.py`)."""

    def extend(self, request: Request, num_tokens: int) -> None:
        """Name those that the request's first `num_tokens` tokens fill, unless it is not cacheable."""

    def tail(self, request: Request, num_tokens: int) -> BlockHash:
        """The name of the page that these tokens fill in part; all before it are named."""


class PrefixCache:
    """Without `names`, nothing is kept or shared. Numbers of tokens: `num_queries` of all requests when they
    first started, `num_hits` of these found in the cache; `num_waits` requests waited for others' tokens."""

    def __init__(self, pages: PageAllocator, names: BlockNames | None) -> None:
        self.num_queries = self.num_hits = self.num_waits = 0
        self._pages = pages
        self._names = names
        self._page_size = pages.page_size
        self._waits_since: dict[str, float] = {}  # by request id

    @property
    def is_on(self) -> bool:
        return self._names is not None

    def add(self, request: Request) -> None:
        """It is queued."""
        if self._names is not None:
            self._names.extend(request, len(request.prompt_token_ids))

    def forget(self, request: Request) -> None:
        """It waits no longer."""
        self._waits_since.pop(request.request_id, None)

    # --- before it starts ---

    def num_found(self, request: Request) -> int:
        """Blocks that it need not compute; its last token is computed in any case, for the one after it, and
        where its prompt is read, all."""
        num_found = self._pages.num_found(request.block_hashes)
        if not num_found or request.sampling.reads_prompt:
            return 0
        return min(num_found, self._num_useful(request))

    def num_owned(self, request: Request, num_found: int) -> int:
        """How many of these blocks are in use anyway."""
        return self._pages.num_owned(request.block_hashes, num_found) if num_found else 0

    def in_turn(self, waiting: Sequence[Request]) -> Iterator[Request]:
        """Requests in the order in which they are to start: as they came, with a lead for what is found.
        Those that were told may leave `waiting` meanwhile."""
        head = list(islice(waiting, NUM_ORDERED))
        if self._names is not None and len(head) > 1 and any(map(self.num_found, head)):
            head.sort(key=self._turn)
        yield from head
        if len(head) == NUM_ORDERED:
            told = set(head)
            yield from [request for request in waiting if request not in told]

    def is_awaited(self, request: Request, num_found: int, prompts: Iterable[BatchItem], now: float) -> bool:
        """Much of what it would compute is being computed by one of `prompts`, a step's items that are no
        decodes: it starts behind that, soon."""
        num_useful = self._num_useful(request)
        if num_found == num_useful or request.sampling.reads_prompt:
            return False
        wanted = request.block_hashes[num_found]
        leader = next((item.request for item in prompts if self._next_block(item) == wanted), None)
        if leader is None:
            return False
        num_alike = _num_alike(request.block_hashes, leader.block_hashes, num_useful)
        num_tokens = request.num_tokens - num_found * self._page_size
        if (num_alike - num_found) * self._page_size < min(MUCH_TOKENS, num_tokens / 2):
            return False
        self.num_waits += request.request_id not in self._waits_since
        return now - self._waits_since.setdefault(request.request_id, now) <= MAX_WAIT_S

    def _num_useful(self, request: Request) -> int:
        return min(len(request.block_hashes), (request.num_tokens - 1) // self._page_size)

    def _turn(self, request: Request) -> tuple[int, float]:
        share = self.num_found(request) * self._page_size / request.num_tokens
        return request.priority, request.arrived_at - MAX_LEAD_S * share

    def _next_block(self, item: BatchItem) -> BlockHash | None:
        """The first one that the item's tokens belong to."""
        names, index = item.request.block_hashes, item.request.num_computed_tokens // self._page_size
        return names[index] if index < len(names) else None

    # --- from its start on ---

    def take(self, request: Request, num_found: int) -> int | None:
        """It starts behind the blocks that were found for it. The page of a tail that it may copy, before
        another page is given to anybody, into its own next one: its rows count as computed then."""
        page = None
        if num_found:
            self._pages.share(request.page_table, request.block_hashes[:num_found])
            request.num_computed_tokens = num_found * self._page_size
            page = self._take_tail(request, num_found)
        queries = self._names is not None and request.is_cacheable and not request.sampling.reads_prompt
        if queries and not request.num_preemptions:
            request.num_cached_tokens = request.num_computed_tokens
            self.num_queries += request.num_tokens
            self.num_hits += request.num_computed_tokens
        return page

    def _take_tail(self, request: Request, num_found: int) -> int | None:
        assert self._names is not None
        start = request.num_computed_tokens
        for num_rows in self._pages.tail_lens(request.block_hashes[num_found - 1]):
            if start + num_rows < request.num_tokens:
                page = self._pages.page_of(self._names.tail(request, start + num_rows))
                if page is not None:
                    request.num_computed_tokens += num_rows
                    return page
        return None

    def keep(self, items: Iterable[BatchItem]) -> None:
        """These items of a committed batch have run without a fault: others may share what they filled.

        To be called before another request is admitted; their tokens, those that were pending too, are known.
        """
        if self._names is None:
            return
        for item in items:
            request = item.request
            if request.num_computed_tokens < item.stop:  # it was preempted meanwhile
                continue
            request.num_kept_tokens = item.stop
            first, last = (item.stop - item.num_tokens) // self._page_size, item.stop // self._page_size
            if first == last:
                continue
            self._names.extend(request, item.stop)
            for index in range(first, min(last, len(request.block_hashes))):
                adapter_id = _adapter_of(request, (index + 1) * self._page_size)
                self._pages.keep(request.page_table, index, request.block_hashes[index], adapter_id)

    def leave(self, request: Request) -> None:
        """It is about to give its pages back: what its last one holds is kept, if there is one before it."""
        num_tokens, request.num_kept_tokens = request.num_kept_tokens, 0
        index, num_rows = divmod(num_tokens, self._page_size)
        if self._names is None or not request.is_cacheable or not index or not num_rows:
            return
        name, adapter_id = self._names.tail(request, num_tokens), _adapter_of(request, num_tokens)
        self._pages.keep(request.page_table, index, name, adapter_id, num_rows)


def _adapter_of(request: Request, num_tokens: int) -> int | None:
    """Whose the last of its first `num_tokens` tokens is."""
    return request.adapter_id if num_tokens > request.adapter_start else None


def _num_alike(names: Sequence[BlockHash], others: Sequence[BlockHash], num_most: int) -> int:
    """With how many blocks both begin, up to `num_most`: a block's name tells of those before it, too."""
    return bisect_left(range(min(num_most, len(others))), True, key=lambda i: names[i] != others[i])
