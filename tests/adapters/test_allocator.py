from hypothesis import given
from hypothesis import strategies as st

from toppings.adapters.allocator import Block, RangeAllocator, plan_compaction

CAPACITY = 64


def in_use(ranges: dict[int, int]) -> list[tuple[int, int]]:
    return sorted(ranges.items())


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=60))
def test_ranges_never_overlap_and_nothing_is_lost(actions: list[tuple[bool, int]]) -> None:
    allocator = RangeAllocator(CAPACITY)
    ranges: dict[int, int] = {}
    for is_allocation, number in actions:
        if is_allocation:
            largest = allocator.largest_free
            offset = allocator.try_allocate(number)
            assert (offset is None) == (number > largest)
            if offset is not None:
                ranges[offset] = number
        elif ranges:
            offset = sorted(ranges)[number % len(ranges)]
            allocator.free(offset, ranges.pop(offset))
        allocator.check_integrity(in_use(ranges))
    for offset, size in ranges.items():
        allocator.free(offset, size)
    assert allocator.largest_free == CAPACITY


def test_smallest_hole_that_suffices_is_taken() -> None:
    allocator = RangeAllocator(CAPACITY)
    allocator.reset([(10, 20), (34, 10), (60, 4)])  # holes of 10, 4 and 16
    assert allocator.try_allocate(3) == 30
    assert allocator.try_allocate(12) == 44


def test_partial_allocation_is_undone() -> None:
    allocator = RangeAllocator(CAPACITY)
    assert allocator.try_allocate_all([40, 0, 30]) is None
    assert allocator.largest_free == CAPACITY
    assert allocator.try_allocate_all([40, 0, 24]) == [0, -1, 40]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9), st.booleans()), max_size=12), st.integers(1, 80)
)
def test_compaction_moves_only_movable_blocks_left_and_opens_the_hole_if_none_is_fixed(
    gaps_sizes: list[tuple[int, int, bool]], needed: int
) -> None:
    blocks, cursor = [], 0
    for gap, size, is_movable in gaps_sizes:
        blocks.append(Block(cursor + gap, size, is_movable))
        cursor += gap + size
    capacity = cursor + 5
    targets = plan_compaction(blocks, needed)
    arena = {block.offset + k: i for i, block in enumerate(blocks) for k in range(block.size)}
    for i, (block, target) in enumerate(zip(blocks, targets)):
        assert target <= block.offset if block.is_movable else target == block.offset
        moved = [arena.pop(block.offset + k) for k in range(block.size)]
        assert set(moved) == {i}, "a move overwrote a block that had yet to move"
        arena.update({target + k: i for k in range(block.size)})
    assert len(arena) == sum(block.size for block in blocks)
    allocator = RangeAllocator(capacity)
    allocator.reset([(target, block.size) for target, block in zip(targets, blocks)])
    if all(block.is_movable for block in blocks) and needed <= allocator.num_free:
        assert allocator.largest_free >= needed
