"""Pages of the key-value cache: who owns which, and which are kept for whoever begins with the same tokens.

    free ─── grow ───> one owner, no name ─── keep ───> owners, a name ─── free ───> a name, nobody's
                                                              <─── share ───
         <──────────────── free ───────────           <───────────── evict, drop ──────────────

A page with a name is a block: it is full, and nobody writes to it any more. Whoever owns a block owns those
of all tokens before it, and no block leaves before those that continue it. So of a sequence's blocks, those
that can be found are its first ones, and so are, among these, those that somebody owns.

A sequence's last page may be kept as a block, too, though it is not full: a tail. Nobody shares it, since
whoever continues it writes behind it, in a page of its own to which it is copied.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heappushpop

from toppings.core import BlockHash


def pages_for(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


@dataclass(slots=True, eq=False)
class Block:
    """A page that is found by `name`. `parent` holds the tokens before it, `adapter_id` has made it; a tail
    holds `num_tokens`, and `tails` counts those that continue this block, by their tokens."""

    page: int
    name: BlockHash
    parent: "Block | None"
    adapter_id: int | None
    depth: int
    num_tokens: int
    num_owners: int = 1
    num_children: int = 0
    worth: tuple[float, int] = (0.0, 0)  # and when it was given up last, counted
    is_listed: bool = False  # among those that may be evicted
    tails: Counter[int] | None = None

    @property
    def is_idle_leaf(self) -> bool:
        return not self.num_owners and not self.num_children


Entry = tuple[tuple[float, int], Block]
"""A block among those that may be evicted, with what it was worth when it was listed."""


class PageAllocator:
    """Hands out page numbers 0 … `num_pages` - 1; knows nothing of tensors.

    Blocks that nobody owns are evicted when pages run out, least worth first: GreedyDual (Young, 1994), with
    what a block costs to compute, 1 + tokens before it / `double_cost_len`, of a tail the part that is full,
    and recency among equals. A block that costs twice as much as another is kept for twice as long.
    """

    def __init__(self, num_pages: int, page_size: int, *, double_cost_len: float = math.inf) -> None:
        """`double_cost_len`: tokens of context with which a token costs twice what it costs without."""
        self.num_pages = num_pages
        self.page_size = page_size
        self.num_evictions = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._blocks: dict[int, Block] = {}  # by page
        self._named: dict[BlockHash, Block] = {}
        self._of_adapter: dict[int, set[Block]] = {}
        self._num_idle = 0  # blocks that nobody owns
        self._cost_per_depth = page_size / double_cost_len
        self._leaving: list[Entry] = []  # heap of every idle leaf, and some others
        self._num_given_up = 0
        self._worth_evicted = 0.0

    @property
    def num_free(self) -> int:
        """Pages that may be handed out, those of idle blocks among them."""
        return len(self._free) + self._num_idle

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend `table` in place to hold `num_tokens`; False, and nothing changed, where pages run out."""
        if num_tokens <= len(table) * self.page_size:
            return True
        num_missing = pages_for(num_tokens, self.page_size) - len(table)
        if num_missing > self.num_free:
            return False
        self._make_free(num_missing)
        table += self._free[: -num_missing - 1 : -1]  # the last one first
        del self._free[-num_missing:]
        return True

    def free(self, table: list[int]) -> None:
        """Take back all pages of `table` and empty it; blocks stay until they are evicted."""
        for page in reversed(table):
            block = self._blocks.get(page)
            if block is None:
                self._free.append(page)
                continue
            block.num_owners -= 1
            self._num_given_up += 1
            cost = (1.0 + block.depth * self._cost_per_depth) * (block.num_tokens / self.page_size)
            block.worth = (self._worth_evicted + cost, self._num_given_up)
            if not block.num_owners:
                self._num_idle += 1
                self._list(block)
        table.clear()

    # --- blocks ---

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def num_found(self, names: Sequence[BlockHash]) -> int:
        """How many of a sequence's blocks, counted from its first, are there."""
        if not names or names[0] not in self._named:
            return 0
        return bisect_left(names, True, lo=1, key=lambda name: name not in self._named)

    def num_owned(self, names: Sequence[BlockHash], num_found: int) -> int:
        """How many of its first `num_found` blocks somebody owns."""
        return bisect_left(names, True, hi=num_found, key=lambda name: not self._named[name].num_owners)

    def share(self, table: list[int], names: Sequence[BlockHash]) -> None:
        """Append these blocks, which are there and continue `table`."""
        for block in map(self._named.__getitem__, names):
            self._own(block)
            table.append(block.page)

    def tail_lens(self, name: BlockHash) -> list[int]:
        """Tokens of the tails that continue this block, which is there; most first."""
        return sorted(self._named[name].tails or (), reverse=True)

    def page_of(self, name: BlockHash) -> int | None:
        block = self._named.get(name)
        return None if block is None else block.page

    def keep(
        self,
        table: list[int],
        index: int,
        name: BlockHash,
        adapter_id: int | None = None,
        num_tokens: int | None = None,
    ) -> None:
        """Page `index` of `table`, whose pages before it are blocks, is full: it is a block from now on.

        Where there is one of that name, `table` gets it instead of its own. `adapter_id`: whose block it is.
        With `num_tokens`, it is a tail that holds as many; there is a page before it, and its table is freed
        next.
        """
        page, known = table[index], self._named.get(name)
        if known is not None:
            self._own(known)
            self._free.append(page)
            table[index] = known.page
            return
        parent = self._blocks[table[index - 1]] if index else None
        block = Block(page, name, parent, adapter_id, index, num_tokens or self.page_size)
        self._named[name] = self._blocks[page] = block
        if parent is not None:
            parent.num_children += 1
            if num_tokens is not None:
                parent.tails = parent.tails or Counter()
                parent.tails[num_tokens] += 1
        if adapter_id is not None:
            self._of_adapter.setdefault(adapter_id, set()).add(block)

    def drop(self, adapter_id: int) -> None:
        """Free an adapter's blocks, which nobody owns."""
        blocks = self._of_adapter.pop(adapter_id, None)
        if blocks is None:
            return
        for block in sorted(blocks, key=lambda block: -block.depth):
            assert not block.num_owners, "a block is dropped while it is in use"
            self._list(self._forget(block))
        self._leaving = [entry for entry in self._leaving if self._is_there(entry[1])]
        heapify(self._leaving)

    def _own(self, block: Block) -> None:
        self._num_idle -= not block.num_owners
        block.num_owners += 1

    def _list(self, block: Block | None) -> None:
        if (entry := self._entry_of(block)) is not None:
            heappush(self._leaving, entry)

    def _entry_of(self, block: Block | None) -> Entry | None:
        """To be listed with. A block that is listed already stays where its worth was then, which was less,
        until it is met."""
        if block is None or block.num_owners or block.num_children or block.is_listed:
            return None
        block.is_listed = True
        return block.worth, block

    def _make_free(self, num: int) -> None:
        """What is evicted is mostly one sequence after the other, last block to first: the one before it is
        asked for next, and need not be sorted in to be met."""
        free, blocks, entry = self._free, self._blocks, None
        while len(free) < num:
            worth, block = heappop(self._leaving) if entry is None else heappushpop(self._leaving, entry)
            entry, block.is_listed = None, False
            if blocks.get(block.page) is not block or block.num_owners or block.num_children:
                continue
            if block.worth > worth:
                entry = self._entry_of(block)
                continue
            self._worth_evicted = max(self._worth_evicted, worth[0])
            self.num_evictions += 1
            entry = self._entry_of(self._forget(block))
        if entry is not None:
            heappush(self._leaving, entry)

    def _is_there(self, block: Block) -> bool:
        return self._blocks.get(block.page) is block

    def _forget(self, block: Block) -> Block | None:
        """The block before it."""
        del self._blocks[block.page], self._named[block.name]
        self._num_idle -= 1
        self._free.append(block.page)
        if block.adapter_id is not None and (blocks := self._of_adapter.get(block.adapter_id)) is not None:
            blocks.discard(block)
        parent = block.parent
        if parent is not None:
            parent.num_children -= 1
            if block.num_tokens < self.page_size and parent.tails is not None:
                parent.tails[block.num_tokens] -= 1
                parent.tails += Counter()  # without those of which there are none
        return parent

    # --- proof ---

    def check_integrity(self, tables: list[list[int]]) -> None:
        """Every page is free, a block, or in exactly one of `tables`; blocks count owners and children."""
        owners = Counter(page for table in tables for page in table)
        plain = [page for page in owners.elements() if page not in self._blocks]
        assert sorted([*self._free, *plain, *self._blocks]) == list(range(self.num_pages)), (
            "a page is lost or owned twice"
        )
        children = Counter(id(block.parent) for block in self._blocks.values() if block.parent is not None)
        ends = [b for b in self._blocks.values() if b.num_tokens < self.page_size]
        tails = Counter((id(block.parent), block.num_tokens) for block in ends)
        for page, block in self._blocks.items():
            parent = block.parent
            assert block.page == page, "a block is at another page"
            assert self._named[block.name] is block, "a block has another's name"
            assert block.num_owners == owners[page], "a block counts its owners wrongly"
            assert block.num_children == children[id(block)], "a block counts its children wrongly"
            counted = {(id(block), num): count for num, count in (block.tails or {}).items()}
            assert counted == {key: n for key, n in tails.items() if key[0] == id(block)}, "a tail is lost"
            assert parent is None or (self._is_there(parent) and parent.num_owners >= block.num_owners), (
                "a block has outlived the one before it"
            )
            assert block.is_listed or not block.is_idle_leaf, "a block can never be evicted"
        assert len(self._named) == len(self._blocks), "a name has no block"
        assert self._num_idle == sum(not block.num_owners for block in self._blocks.values())
