"""The channel's ring, areas and numbers, both ends in one process."""

import os
from itertools import pairwise

import pytest

from toppings.assist.channel import LINE_BYTES, SLOT_WORDS, Channel


@pytest.fixture
def ends() -> tuple[Channel, Channel]:
    engine = Channel.create(num_slots=4, input_bytes=1000, output_bytes=500)
    return engine, Channel(os.dup(engine.fd))


def post(engine: Channel, word: int, *, input_bytes: int = 8) -> int | None:
    if engine.try_reserve(input_bytes, 8) is None:
        return None
    number = engine.post([word] * SLOT_WORDS)
    engine.announce(number)
    return number


def test_requests_are_observed_in_the_order_they_were_published(ends: tuple[Channel, Channel]) -> None:
    engine, worker = ends
    for round_ in range(5):
        engine.recycle()
        numbers = [post(engine, 10 * round_ + i) for i in range(3)]
        assert numbers == [3 * round_ + 1 + i for i in range(3)]
        for i in range(3):
            assert worker.observe() == [10 * round_ + i] * SLOT_WORDS
            worker.finish()
            assert engine.done == numbers[i]


def test_an_empty_channel_has_no_request(ends: tuple[Channel, Channel]) -> None:
    engine, worker = ends
    assert not worker.has_request
    post(engine, 1)
    assert worker.has_request
    worker.finish()
    assert not worker.has_request
    assert engine.is_drained


def test_a_full_ring_takes_no_more_until_one_is_done(ends: tuple[Channel, Channel]) -> None:
    engine, worker = ends
    assert all(post(engine, i) for i in range(4))
    assert post(engine, 4) is None
    worker.finish()
    assert post(engine, 4) == 5


def test_a_full_area_takes_no_more_until_all_are_done_and_read(ends: tuple[Channel, Channel]) -> None:
    engine, worker = ends
    assert post(engine, 0, input_bytes=600)
    assert post(engine, 1, input_bytes=600) is None
    assert post(engine, 1, input_bytes=384)
    worker.finish()
    engine.recycle()
    assert post(engine, 2, input_bytes=600) is None, "the second request's rows are still in use"
    worker.finish()
    assert post(engine, 2, input_bytes=600) is None, "the results may not have been read"
    engine.recycle()
    assert post(engine, 2, input_bytes=600)


def test_a_request_larger_than_the_area_never_fits(ends: tuple[Channel, Channel]) -> None:
    engine, _ = ends
    assert engine.try_reserve(1025, 8) is None
    assert engine.try_reserve(1024, 513) is None
    assert engine.try_reserve(1024, 512) is not None


def test_areas_are_disjoint_aligned_and_inside(ends: tuple[Channel, Channel]) -> None:
    engine, _ = ends
    taken: list[tuple[int, int]] = []
    while (room := engine.try_reserve(100, 70)) is not None:
        engine.announce(engine.post([0]))
        taken += [(room[0], room[0] + 100), (room[1], room[1] + 70)]
    taken.sort()
    assert len(taken) >= 6
    assert all(start % LINE_BYTES == 0 for start, _ in taken)
    assert all(a[1] <= b[0] for a, b in pairwise(taken))
    assert taken[0][0] >= engine.input_start
    assert taken[-1][1] <= len(engine.buffer)


def test_both_ends_see_the_same_bytes(ends: tuple[Channel, Channel]) -> None:
    engine, worker = ends
    room = engine.try_reserve(5, 5)
    assert room is not None
    engine.buffer[room[0] : room[0] + 5] = b"rows!"
    worker.buffer[room[1] : room[1] + 5] = b"sums!"
    assert bytes(worker.buffer[room[0] : room[0] + 5]) == b"rows!"
    assert bytes(engine.buffer[room[1] : room[1] + 5]) == b"sums!"


def test_a_request_is_seen_when_it_is_announced(ends: tuple[Channel, Channel]) -> None:
    engine, worker = ends
    numbers = [engine.post([i] * SLOT_WORDS) for i in range(3)]
    assert not worker.has_request
    assert engine.num_free_slots == 1
    engine.announce(numbers[1])
    for i in range(2):
        assert worker.observe()[0] == i
        worker.finish()
    assert not worker.has_request
    assert not engine.is_drained


def test_a_channel_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="0 slots"):
        Channel.create(num_slots=0, input_bytes=1, output_bytes=1)
