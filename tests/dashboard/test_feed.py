"""One reading for all viewers, none without them; what each is sent."""

import asyncio
import json
from contextlib import AbstractContextManager, aclosing
from typing import Any

from tests.waiting import until
from toppings.dashboard.feed import FIRM_S, LIFE_S, MAX_VIEWERS, MAX_VIEWERS_EACH, Feed


class Source:
    def __init__(self) -> None:
        self.sections: dict[str, object] = {"a": 1, "b": {"x": [1]}}
        self.num_reads = 0
        self.fails = False

    async def __call__(self) -> dict[str, object]:
        self.num_reads += 1
        if self.fails:
            raise RuntimeError("told to fail")
        return dict(self.sections)


class Viewer:
    """Holds a place and takes events when it is told to."""

    def __init__(self, feed: Feed, whose: str = "") -> None:
        viewer = feed.enter(whose)
        assert viewer is not None
        self.place: AbstractContextManager[None] = feed.viewing(viewer)
        self.place.__enter__()
        self.stream = feed.events(viewer)
        self.known: dict[str, Any] = {}

    async def take(self) -> dict[str, Any]:
        event = await anext(self.stream)
        assert event.startswith(b"data: ")
        assert event.endswith(b"\n\n")
        told: dict[str, Any] = json.loads(event[6:])
        self.known |= told
        return told

    async def leave(self) -> None:
        await self.stream.aclose()
        self.place.__exit__(None, None, None)


def feed_of(source: Source, period_s: float = 0.001) -> Feed:
    return Feed(source, period_s=period_s)


async def test_a_viewer_is_sent_all_and_then_what_changes() -> None:
    source = Source()
    viewer = Viewer(feed_of(source))
    assert await viewer.take() == source.sections
    source.sections["b"] = {"x": [2]}
    while not (told := await viewer.take()):
        pass
    assert told == {"b": {"x": [2]}}
    assert await viewer.take() == {}
    await viewer.leave()


async def test_readings_are_for_all_viewers_and_end_with_the_last() -> None:
    source = Source()
    feed = feed_of(source)
    viewers = [Viewer(feed) for _ in range(10)]
    for _ in range(5):
        for viewer in viewers:
            await viewer.take()
    assert source.num_reads < 5 * len(viewers)
    for viewer in viewers:
        await viewer.leave()
    assert feed.num_viewers == 0
    read = source.num_reads
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert source.num_reads == read


async def test_a_slow_viewer_gets_the_latest_and_nothing_is_kept_for_it() -> None:
    source = Source()
    feed = feed_of(source)
    slow, quick = Viewer(feed), Viewer(feed)
    await slow.take()
    await quick.take()
    for number in range(50):
        source.sections["a"] = number
        while "a" not in await quick.take():
            pass
    assert await slow.take() == {"a": 49}
    assert slow.known == quick.known
    await slow.leave()
    await quick.leave()


async def test_a_viewer_that_comes_later_is_sent_all() -> None:
    source = Source()
    feed = feed_of(source)
    first = Viewer(feed)
    await first.take()
    second = Viewer(feed)
    assert await second.take() == source.sections
    await first.leave()
    await second.take()
    await second.leave()


async def test_a_reading_that_fails_is_tried_again() -> None:
    source = Source()
    viewer = Viewer(feed_of(source))
    await viewer.take()
    source.fails = True
    read = source.num_reads
    waiting = asyncio.ensure_future(viewer.take())
    await until(lambda: source.num_reads > read + 3)
    assert not waiting.done()
    source.fails, source.sections["a"] = False, 2
    assert (await waiting).get("a", 2) == 2
    await viewer.leave()


async def test_closing_ends_every_stream() -> None:
    feed = feed_of(Source(), period_s=3600.0)
    viewers = [Viewer(feed) for _ in range(3)]
    for viewer in viewers:
        await viewer.take()
    waiting = [asyncio.ensure_future(viewer.take()) for viewer in viewers]
    await asyncio.sleep(0)
    feed.close()
    for told in waiting:
        assert await told == {}
    for viewer in viewers:
        async with aclosing(viewer.stream) as stream:
            assert [event async for event in stream] == []
        await viewer.leave()


async def test_one_key_takes_half_of_the_places_and_then_its_own() -> None:
    feed, now = feed_of(Source()), [0.0]
    feed.clock = lambda: now[0]
    rude = [Viewer(feed, "rude") for _ in range(MAX_VIEWERS_EACH)]
    assert feed.enter("rude") is None  # none of them has had its time yet
    first = await rude[0].take()
    assert first
    other = Viewer(feed, "other")
    now[0] = FIRM_S
    late = Viewer(feed, "rude")
    assert feed.num_viewers == MAX_VIEWERS_EACH + 1
    async with aclosing(rude[0].stream) as ended:
        assert len([event async for event in ended]) <= 1
    assert await rude[1].take()
    assert await other.take()
    assert await late.take()


async def test_whoever_comes_to_a_full_house_has_the_place_of_who_has_most() -> None:
    feed, now = feed_of(Source()), [0.0]
    feed.clock = lambda: now[0]
    old = Viewer(feed, "old")
    others = [Viewer(feed, "ab"[number % 2]) for number in range(MAX_VIEWERS - 1)]
    assert feed.enter("c") is None
    now[0] = FIRM_S
    newcomers = [Viewer(feed, f"c{number}") for number in range(MAX_VIEWERS // 2)]
    assert feed.num_viewers == MAX_VIEWERS
    assert await old.take()
    for newcomer in newcomers:
        assert await newcomer.take()
    assert await old.take() is not None
    for viewer in (old, *newcomers):
        await viewer.leave()
    assert feed.num_viewers == len(others) - len(newcomers)


async def test_a_stream_ends_after_its_time() -> None:
    feed, now = feed_of(Source()), [0.0]
    feed.clock = lambda: now[0]
    viewer = Viewer(feed)
    await viewer.take()
    now[0] = LIFE_S / 2
    young = Viewer(feed)
    now[0] = LIFE_S
    async with aclosing(viewer.stream) as stream:
        assert len([event async for event in stream]) <= 1
    await young.take()
    assert await young.take() is not None
    await viewer.leave()
    await young.leave()


async def test_one_reading_serves_those_who_ask_together() -> None:
    source = Source()
    feed = feed_of(source, period_s=3600.0)
    told = await asyncio.gather(*(feed.latest() for _ in range(20)))
    assert {json.dumps(json.loads(each)) for each in told} == {json.dumps(source.sections)}
    assert source.num_reads == 1
