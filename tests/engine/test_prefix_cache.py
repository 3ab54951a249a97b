"""Requests that begin alike share pages: which ones, in which order they start, and what becomes of them."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from tests.engine.test_scheduler import FakePlacement
from toppings.core import Admission, Batch, Request
from toppings.engine.block_hashes import BlockHasher
from toppings.engine.pages import PageAllocator
from toppings.engine.prefix_cache import MAX_LEAD_S, MAX_WAIT_S
from toppings.engine.scheduler import Scheduler
from toppings.engine.scheduler_limits import SchedulerLimits
from toppings.sampling_params import SamplingParams

SIZE = 4


class Cache:
    """A scheduler with a cache that knows what was written where, and finds each step's tokens in it."""

    def __init__(
        self, *, num_pages: int = 100, placement: FakePlacement | None = None, **limits: Any
    ) -> None:
        defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64}
        self.scheduler = Scheduler(
            SchedulerLimits(**{**defaults, "max_adapter_wait_s": 1.0, **limits}),
            PageAllocator(num_pages, SIZE),
            placement or FakePlacement(),
            BlockHasher(SIZE),
        )
        self.written: dict[tuple[int, int], object] = {}  # by page and place in it
        self.computed: dict[str, int] = {}  # tokens, by request

    def add(
        self, name: str, tokens: Sequence[int], adapter_id: int | None = None, at: float = 0.0, **more: Any
    ) -> Request:
        request = Request(name, list(tokens), SamplingParams(max_tokens=8), adapter_id, at, **more)
        self.scheduler.add(request)
        return request

    def step(self, now: float = 0.0, *, finish_at: int = 1, fails: bool = False) -> list[str]:
        """The names of those that ran; they draw tokens that depend on all their tokens."""
        batch = self.scheduler.schedule(now)
        drawing = [item.request for item in batch.items if item.needs_sample]
        self.scheduler.commit(batch)
        if fails:
            for item in batch.items:
                self.scheduler.finish(item.request)
        else:
            self._write(batch)
            self.scheduler.cache.keep(batch.items)
            for request in drawing:
                request.output_token_ids.append(sum(request.token_ids(0, 1000)) % 7)
                if len(request.output_token_ids) >= finish_at:
                    self.scheduler.finish(request)
        self.scheduler.check_integrity()
        return [item.request.request_id for item in batch.items]

    def run(self, **step: Any) -> None:
        while list(self.scheduler.requests()):
            self.step(**step)

    def _write(self, batch: Batch) -> None:
        copied = {}
        for item in batch.items:
            index, num_rows = divmod(item.stop - item.num_tokens, SIZE)
            for row in range(num_rows if item.copy_page is not None else 0):
                copied[item.request.page_table[index], row] = self.written[item.copy_page or 0, row]
        self.written |= copied
        for item in batch.items:
            request = item.request
            start = item.stop - item.num_tokens
            for at in range(item.stop):
                place = (request.page_table[at // SIZE], at % SIZE)
                content = (request.adapter_id, request.cache_salt, tuple(request.token_ids(0, at + 1)))
                if at >= start:
                    self.written[place] = content
                assert self.written[place] == content, (request.request_id, at)
            self.computed[request.request_id] = self.computed.get(request.request_id, 0) + item.num_tokens


def test_a_request_computes_what_is_behind_the_pages_that_it_shares() -> None:
    cache = Cache()
    cache.add("a", range(18))
    cache.run()
    other = cache.add("b", [*range(14), 99, 98, 97])
    cache.run()
    assert cache.computed == {"a": 18, "b": 5}
    assert other.num_cached_tokens == 12
    assert (cache.scheduler.cache.num_queries, cache.scheduler.cache.num_hits) == (35, 12)


def test_the_last_token_is_computed_though_all_are_there() -> None:
    cache = Cache()
    for name in "ab":
        cache.add(name, range(16))
        cache.run()
    assert cache.computed == {"a": 16, "b": 4}


def test_the_next_turn_finds_the_answer_too() -> None:
    cache = Cache()
    first = cache.add("a", range(10))
    cache.run(finish_at=7)
    cache.add("b", [*first.prompt_token_ids, *first.output_token_ids, 50, 51])
    cache.run()
    assert cache.computed["b"] == 19 - 16


def talk_on(cache: Cache, *, more: int = 3, **other: Any) -> Request:
    """A request of 13 tokens that is answered with 5, and one that begins with both and has `more` tokens."""
    first = cache.add("a", range(13), **{"adapter_id": 1, **other})
    cache.run(finish_at=5)
    return cache.add("b", [*first.token_ids(0, 18), *range(50, 50 + more)], **{"adapter_id": 1, **other})


def test_the_next_turn_copies_the_page_that_the_last_one_did_not_fill() -> None:
    cache = Cache()
    second = talk_on(cache)  # 17 tokens are in the cache: the last one was drawn and not computed
    assert cache.step(finish_at=9) == ["b"]
    assert (cache.computed["b"], second.num_cached_tokens) == (4, 17)
    assert cache.scheduler.pages.num_used == 6  # the tail itself is nobody's
    cache.run()
    assert cache.scheduler.pages.num_used == 0


def test_a_tail_is_copied_though_its_page_is_given_away_in_the_same_step() -> None:
    cache = Cache(num_pages=16, max_model_len=64)
    second = talk_on(cache, more=45)
    assert cache.step() == ["b"]
    assert second.num_cached_tokens == 17
    assert cache.scheduler.pages.num_evictions == 1


def test_a_tail_never_stands_for_all_tokens_of_a_request() -> None:
    cache = Cache()
    first = cache.add("a", range(13))
    cache.run(finish_at=5)
    for name, num_tokens, num_computed in (("b", 17, 1), ("c", 18, 1), ("d", 19, 1)):
        cache.add(name, [*first.token_ids(0, 18), 60][:num_tokens])
        cache.run()
        assert cache.computed[name] == num_computed, name


def test_a_tail_with_another_token_is_not_taken() -> None:
    cache = Cache()
    first = cache.add("a", range(15))
    cache.run(finish_at=1)
    other = cache.add("b", [*first.token_ids(0, 14), 99, 98])
    cache.run()
    assert other.num_cached_tokens == 12


def test_an_activated_adapter_takes_the_base_models_tail_and_nobody_its_own() -> None:
    """Blocks are named when a request is queued, with the place from which its adapter acts."""
    cache = Cache()

    def ask(name: str, num_tokens: int, adapter_id: int | None, start: int) -> int:
        request = Request(name, list(range(num_tokens)), SamplingParams(max_tokens=8), adapter_id)
        request.adapter_start = start
        cache.scheduler.add(request)
        cache.scheduler.check_integrity()
        batch = cache.scheduler.schedule(0.0)
        cache.scheduler.commit(batch)
        cache.scheduler.cache.keep(batch.items)
        cache.scheduler.finish(request)
        cache.scheduler.check_integrity()
        return request.num_cached_tokens

    assert ask("base", 14, None, 0) == 0
    assert ask("acts behind it", 15, 1, 14) == 14
    assert ask("acts within it", 15, 1, 13) == 12
    assert ask("the same", 16, 1, 14) == 15
    assert ask("acts elsewhere", 16, 1, 13) == 15
    assert ask("another", 16, 2, 14) == 14
    assert ask("ordinary", 16, 2, 0) == 0


def test_a_failed_step_leaves_a_tail_of_what_was_right_before_it() -> None:
    cache = Cache()
    cache.add("a", range(14))
    cache.step(finish_at=9)
    cache.step(finish_at=9, fails=True)
    other = cache.add("b", [*range(14), 0, 0, 0])
    cache.run()
    assert other.num_cached_tokens == 14


def test_a_prompt_that_is_scored_takes_nothing_and_leaves_all() -> None:
    cache = Cache()
    scored = SamplingParams(max_tokens=8, prompt_logprobs=0)
    for name in "ab":
        cache.scheduler.add(Request(name, list(range(18)), scored))
        cache.run()
    third = cache.add("c", [*range(18), 3])
    cache.run()
    assert cache.computed == {"a": 18, "b": 18, "c": 1}
    assert third.num_cached_tokens == 18
    assert cache.scheduler.cache.num_queries == 19


@pytest.mark.parametrize("other", [{"adapter_id": 2}, {"adapter_id": None}, {"cache_salt": "b"}])
def test_nobody_finds_what_another_adapter_or_salt_has_left(other: dict[str, Any]) -> None:
    cache = Cache()
    mine: dict[str, Any] = {"adapter_id": 1, "cache_salt": "a"}
    cache.add("a", range(16), **mine)
    cache.run()
    cache.add("b", range(16), **{**mine, **other})
    cache.run()
    assert cache.computed["b"] == 16


def test_salts_and_adapters_are_not_taken_for_tokens_of_each_other() -> None:
    hasher = BlockHasher(SIZE)
    seen = set()
    for adapter_id in (None, 0, 1, 2**40):
        for salt in (None, "a", "aa", "\0", "\N{GRINNING FACE}"):
            request = Request("r", [1] * 8, SamplingParams(), adapter_id, cache_salt=salt)
            hasher.extend(request, 8)
            seen |= set(request.block_hashes)
    assert len(seen) == 2 * 4 * 5


def test_one_that_is_not_cacheable_finds_nothing_and_leaves_nothing() -> None:
    cache = Cache()
    for name, is_cacheable in (("a", False), ("b", True), ("c", False)):
        cache.add(name, range(16), is_cacheable=is_cacheable)
        cache.run()
    assert cache.computed == {"a": 16, "b": 16, "c": 16}
    assert cache.scheduler.cache.num_queries == 16


def test_a_step_that_fails_leaves_nothing_to_find() -> None:
    cache = Cache()
    cache.add("a", range(16))
    cache.step(fails=True)
    cache.add("b", range(16))
    cache.run()
    assert cache.computed == {"b": 16}


def test_a_preempted_request_finds_its_own_tokens() -> None:
    cache = Cache(num_pages=16, max_model_len=40)
    cache.add("old", range(24), at=0.0)
    young = cache.add("young", range(100, 124), at=1.0)
    while not young.num_preemptions:
        cache.step(finish_at=30)
    computed, num_tokens = cache.computed["young"], young.num_tokens
    cache.scheduler.finish(next(iter(cache.scheduler.running)))
    cache.step(finish_at=30)
    assert cache.computed["young"] - computed <= num_tokens - 24 + 2 * SIZE
    assert young.num_cached_tokens == 0


def test_those_that_come_together_compute_what_they_share_once() -> None:
    cache = Cache()
    for name in "abcd":
        cache.add(name, range(18))
    assert cache.step(finish_at=9) == ["a"]
    assert cache.step(finish_at=9) == ["a", "b", "c", "d"]
    assert cache.computed == {"a": 19, "b": 2, "c": 2, "d": 2}
    assert cache.scheduler.cache.num_waits == 3
    assert cache.scheduler.pages.num_used == 4 + 4  # what they share, and one page each


def test_they_wait_through_all_chunks_of_the_first_and_others_do_not() -> None:
    cache = Cache(max_num_batched_tokens=10)
    cache.add("a", range(18))
    cache.add("b", range(18))
    cache.add("other", [50, 51, 52])
    assert cache.step(finish_at=9) == ["a"]
    assert cache.step(finish_at=9) == ["a", "other"]
    assert cache.step(finish_at=9) == ["a", "other", "b"]
    assert cache.computed["b"] == 2


def test_a_short_beginning_in_common_is_not_waited_for() -> None:
    cache = Cache()
    cache.add("a", range(18))
    cache.add("b", [*range(4), *range(50, 62)])
    assert cache.step() == ["a", "b"]
    assert cache.scheduler.cache.num_waits == 0


def test_nobody_waits_for_others_tokens_for_ever() -> None:
    cache = Cache()
    cache.add("waits", range(18), at=1.0)
    ran: list[list[str]] = []
    while len(ran) <= MAX_WAIT_S:
        cache.add(f"fails {len(ran)}", range(18), at=0.0)
        ran.append(cache.step(now=float(len(ran)), fails=True))
    assert ran == [[f"fails {i}"] for i in range(len(ran))]
    cache.add("another", range(18), at=0.0)
    assert cache.step(now=float(len(ran))) == ["another", "waits"]


def test_when_the_first_has_gone_the_next_one_computes() -> None:
    cache = Cache(max_num_batched_tokens=10)
    first = cache.add("a", range(18))
    cache.add("b", range(18))
    cache.step()
    cache.scheduler.finish(first)
    assert cache.step() == ["b"]
    assert cache.computed["b"] == 8  # it found two pages and the half of one


def test_who_is_in_the_cache_starts_earlier_but_not_by_more_than_the_lead() -> None:
    for lead, order in ((0.5 * MAX_LEAD_S, ["cached", "new"]), (1.1 * MAX_LEAD_S, ["new", "cached"])):
        cache = Cache(max_num_seqs=1)
        cache.add("before", range(40))
        cache.run()
        cache.add("new", range(100, 140), at=10.0)
        cache.add("cached", range(40), at=10.0 + lead)
        started = [cache.step(now=11.0)[0] for _ in range(2)]
        assert started == order


def test_an_adapter_is_asked_for_the_tokens_that_are_left() -> None:
    asked: list[int] = []

    class Asked(FakePlacement):
        def try_acquire(self, adapter_id: int, now: float, *, num_tokens: int = 1) -> Admission:
            asked.append(num_tokens)
            return super().try_acquire(adapter_id, now, num_tokens=num_tokens)

    cache = Cache(placement=Asked())
    for name in "ab":
        cache.add(name, range(18), adapter_id=1)
        cache.run()
    assert asked == [18, 2]


def test_pages_are_right_under_random_loads_with_few_of_them() -> None:
    """Conversations that branch, adapters, salts, aborts, failed steps, preemptions: `Cache` looks at each
    token that a step reads."""
    rng = random.Random(1)
    cache = Cache(
        num_pages=26,
        max_num_seqs=5,
        max_num_batched_tokens=20,
        max_adapter_wait_s=0.05,
        placement=FakePlacement(2),
    )
    talks: list[list[int]] = [[]]
    for number in range(700):
        if rng.random() < 0.7:
            tokens = [*rng.choice(talks), *(rng.randrange(3) for _ in range(rng.randint(1, 9)))][:50]
            adapter_id, salt = rng.choice([None, None, 1, 2, 3]), rng.choice([None, "s"])
            request = cache.add(str(number), tokens, adapter_id, at=number * 0.01, cache_salt=salt)
            talks = [*talks[-9:], request.token_ids(0, 50)]
        if rng.random() < 0.05 and (live := list(cache.scheduler.requests())):
            cache.scheduler.finish(rng.choice(live))
        cache.step(number * 0.01, finish_at=6, fails=rng.random() < 0.02)
    for number in range(700, 5000):
        cache.step(number * 0.01, finish_at=6)
    scheduler = cache.scheduler
    assert not list(scheduler.requests())
    assert scheduler.pages.num_used == 0
    assert scheduler.num_preemptions > 0
    assert scheduler.pages.num_evictions > 100
    assert scheduler.cache.num_hits > 1000
    for adapter_id in (1, 2, 3):
        scheduler.pages.drop(adapter_id)
    scheduler.check_integrity()
