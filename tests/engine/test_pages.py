"""Pages and blocks: what is kept, who owns it, what leaves first; held against a slow and plain model."""

import random
from dataclasses import dataclass, field

import pytest

from toppings.engine.pages import PageAllocator

SIZE = 4


@dataclass
class Sequence:
    """Names of blocks as paths: that of a block is its parent's and one letter more."""

    path: str
    table: list[int] = field(default_factory=list)
    num_kept: int = 0


def make_pages(num_pages: int, **settings: float) -> PageAllocator:
    return PageAllocator(num_pages, SIZE, **settings)


def names_of(path: str) -> list[str]:
    return [path[:end] for end in range(1, len(path) + 1)]


def run(pages: PageAllocator, path: str, adapter_id: int | None = None) -> Sequence:
    """One sequence from start to end of its blocks; it still owns them."""
    sequence = Sequence(path)
    names = names_of(path)
    num_found = pages.num_found(names)
    pages.share(sequence.table, names[:num_found])
    assert pages.grow(sequence.table, len(path) * SIZE)
    for index in range(num_found, len(path)):
        pages.keep(sequence.table, index, names[index], adapter_id)
    return sequence


def test_what_was_kept_is_found_by_its_beginning_and_shared() -> None:
    pages = make_pages(10)
    first = run(pages, "abcd")
    other = run(pages, "abx")
    assert other.table[:2] == first.table[:2]
    assert pages.num_used == 5
    pages.free(first.table)
    assert (pages.num_found(names_of("abcdef")), pages.num_owned(names_of("abcd"), 4)) == (4, 2)
    assert pages.num_used == 3
    pages.free(other.table)
    assert pages.num_used == 0
    pages.check_integrity([])


def test_two_that_compute_the_same_block_end_up_with_one_page() -> None:
    pages = make_pages(10)
    tables: list[list[int]] = [[], []]
    for table in tables:
        pages.grow(table, 2 * SIZE)
    for index, name in enumerate(names_of("ab")):
        for table in tables:
            pages.keep(table, index, name)
    assert tables[0] == tables[1]
    assert pages.num_used == 2
    pages.check_integrity(tables)


def test_the_least_recently_used_leaves_first_and_children_before_parents() -> None:
    pages = make_pages(6)
    for path in ("abc", "xyz"):
        pages.free(run(pages, path).table)
    pages.free(run(pages, "abc").table)
    taken: list[list[int]] = []
    for left in (("xy", "abc"), ("x", "abc"), ("", "abc"), ("", "ab"), ("", "a"), ("", "")):
        taken.append([])
        assert pages.grow(taken[-1], SIZE)
        found = [pages.num_found(names_of(path)) for path in ("xyz", "abc")]
        assert found == [len(path) for path in left]
    assert not pages.grow([], SIZE)
    pages.check_integrity(taken)


def test_what_costs_more_to_compute_again_is_kept_longer() -> None:
    deep, flat = "abcdefgh", "xyzuvwrs"
    for double_cost_len, num_left in ((float("inf"), 0), (8.0, 8)):
        pages = make_pages(16, double_cost_len=double_cost_len)
        pages.free(run(pages, deep).table)
        for letter in flat:
            pages.free(run(pages, letter).table)
        assert pages.grow([], 8 * SIZE)
        assert pages.num_found(names_of(deep)) == num_left


def test_an_adapters_blocks_are_dropped_at_once_and_no_others() -> None:
    pages = make_pages(10)
    pages.free(run(pages, "base").table)
    for adapter_id in (1, 2):
        pages.free(run(pages, str(adapter_id) * 3, adapter_id).table)
    pages.drop(1)
    assert [pages.num_found(names_of(path)) for path in ("base", "111", "222")] == [4, 0, 3]
    pages.check_integrity([])
    assert pages.grow([], 10 * SIZE)
    pages.drop(2)
    pages.drop(3)


def test_a_tail_is_found_behind_its_block_and_leaves_before_it() -> None:
    pages = make_pages(6)
    for num_tokens, name in ((3, "ab?"), (1, "ab!"), (3, "ab?")):
        sequence = run(pages, "ab")
        assert pages.grow(sequence.table, 2 * SIZE + num_tokens)
        pages.keep(sequence.table, 2, name, None, num_tokens)
        pages.free(sequence.table)
    assert pages.tail_lens("ab") == [3, 1]
    assert pages.tail_lens("a") == []
    assert (pages.num_blocks, pages.num_used) == (4, 0)
    taken: list[list[int]] = [[]]
    assert pages.grow(taken[0], 2 * SIZE)
    for left in ([3], []):  # a row that is computed again costs the less the fewer there are
        taken.append([])
        assert pages.grow(taken[-1], SIZE)
        assert (pages.tail_lens("ab"), pages.page_of("ab!")) == (left, None)
        pages.check_integrity(taken)
    assert pages.num_found(names_of("ab")) == 2


def test_used_blocks_are_never_evicted() -> None:
    pages = make_pages(4)
    used, table = run(pages, "abc"), list[int]()
    assert pages.grow(table, SIZE)
    assert not pages.grow(table, 2 * SIZE)
    assert pages.num_found(names_of("abc")) == 3
    pages.check_integrity([used.table, table])


class PlainModel:
    """A dict from name to owners, worth and when it was given up, all of it searched each time."""

    def __init__(self, num_pages: int, double_cost_len: float) -> None:
        self.num_pages, self.cost = num_pages, SIZE / double_cost_len
        self.blocks: dict[str, tuple[int, float, int]] = {}
        self.level, self.clock, self.num_evicted = 0.0, 0, 0
        self.running: list[Sequence] = []

    @property
    def num_plain(self) -> int:
        """Pages of running sequences that are no blocks."""
        return sum(len(sequence.table) - sequence.num_kept for sequence in self.running)

    @property
    def num_free(self) -> int:
        num_owned = sum(owners > 0 for owners, *_ in self.blocks.values())
        return self.num_pages - self.num_plain - num_owned

    def own(self, name: str) -> None:
        owners, *worth = self.blocks.get(name, (0, 0.0, 0))
        self.blocks[name] = (owners + 1, *worth)  # type: ignore[assignment]

    def grow(self, num_missing: int) -> None:
        while self.num_pages - self.num_plain - len(self.blocks) < num_missing:
            parents = {name[:-1] for name in self.blocks}
            idle = [name for name, block in self.blocks.items() if not block[0] and name not in parents]
            least = min(idle, key=lambda name: self.blocks[name][1:])
            self.level = max(self.level, self.blocks.pop(least)[1])
            self.num_evicted += 1

    def free(self, sequence: Sequence) -> None:
        for depth in reversed(range(sequence.num_kept)):
            self.clock += 1
            name = sequence.path[: depth + 1]
            self.blocks[name] = (self.blocks[name][0] - 1, self.level + 1 + depth * self.cost, self.clock)


def begin(pages: PageAllocator, model: PlainModel, path: str) -> None:
    """One sequence more, if it has room; with a page at its end that is not full."""
    names, sequence = names_of(path), Sequence(path)
    num_found = pages.num_found(names)
    assert num_found == sum(name in model.blocks for name in names)
    num_owned = sum(model.blocks[name][0] > 0 for name in names[:num_found])
    assert pages.num_owned(names, num_found) == num_owned
    if len(path) + 1 - num_owned > pages.num_free:
        return
    pages.share(sequence.table, names[:num_found])
    for name in names[:num_found]:
        model.own(name)
    sequence.num_kept = num_found
    model.grow(len(path) + 1 - num_found)
    assert pages.grow(sequence.table, (len(path) + 1) * SIZE)
    model.running.append(sequence)


@pytest.mark.parametrize("double_cost_len", [float("inf"), 20.0])
def test_random_operations_agree_with_a_plain_model(double_cost_len: float) -> None:
    rng = random.Random(0)
    pages, model = make_pages(24, double_cost_len=double_cost_len), PlainModel(24, double_cost_len)
    for _ in range(3000):
        if rng.random() < 0.45:
            letters = ["ab" if i < 3 else "abcd" for i in range(rng.randint(1, 7))]
            begin(pages, model, "".join(map(rng.choice, letters)))
        elif model.running and rng.random() < 0.6:
            sequence = rng.choice(model.running)
            if sequence.num_kept < len(sequence.path):
                name = sequence.path[: sequence.num_kept + 1]
                pages.keep(sequence.table, sequence.num_kept, name)
                model.own(name)
                sequence.num_kept += 1
        elif model.running:
            sequence = model.running.pop(rng.randrange(len(model.running)))
            pages.free(sequence.table)
            model.free(sequence)
        pages.check_integrity([sequence.table for sequence in model.running])
        assert pages.num_free == model.num_free
        assert pages.num_evictions == model.num_evicted
    assert model.num_evicted > 100
    for sequence in model.running:
        pages.free(sequence.table)
    assert pages.num_used == 0
    pages.check_integrity([])
