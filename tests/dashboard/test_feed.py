"""One reading for all viewers, none without them; what each is sent."""

import asyncio
import json
from contextlib import AbstractContextManager, aclosing
from typing import Any

from tests.waiting import until
from toppings.dashboard.feed import MAX_VIEWERS, Feed


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

    def __init__(self, feed: Feed) -> None:
        self.place: AbstractContextManager[None] = feed.viewing()
        self.place.__enter__()
        self.stream = feed.events()
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


async def test_places_are_bounded() -> None:
    feed = feed_of(Source())
    viewers = [Viewer(feed) for _ in range(MAX_VIEWERS)]
    assert feed.is_full
    await viewers[0].leave()
    assert not feed.is_full


async def test_one_reading_serves_those_who_ask_together() -> None:
    source = Source()
    feed = feed_of(source, period_s=3600.0)
    told = await asyncio.gather(*(feed.latest() for _ in range(20)))
    assert {json.dumps(json.loads(each)) for each in told} == {json.dumps(source.sections)}
    assert source.num_reads == 1
