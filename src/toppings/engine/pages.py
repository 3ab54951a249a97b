"""Pages of the key-value cache: who owns which."""


def pages_for(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


class PageAllocator:
    """Hands out page numbers 0 … `num_pages` - 1; knows nothing of tensors.

    A page belongs to the free list or to exactly one request's page table.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend `table` in place to hold `num_tokens`; False, and nothing changed, where pages run out."""
        num_missing = pages_for(num_tokens, self.page_size) - len(table)
        if num_missing > len(self._free):
            return False
        table.extend(self._free.pop() for _ in range(num_missing))
        return True

    def free(self, table: list[int]) -> None:
        """Take back all pages of `table` and empty it."""
        self._free.extend(reversed(table))
        table.clear()

    def check_integrity(self, tables: list[list[int]]) -> None:
        """Every page is free or in exactly one of `tables`."""
        pages = self._free + [page for table in tables for page in table]
        assert sorted(pages) == list(range(self.num_pages)), "a page is lost or owned twice"
