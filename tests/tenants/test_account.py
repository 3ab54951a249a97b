import gc
import math

import pytest

from toppings.tenants.account import Account, Bucket, Tally
from toppings.tenants.refusals import Refusal, duration
from toppings.tenants.tenant import Tenant


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def account(clock: Clock, **limits: int) -> Account:
    return Account(Tenant(name="a", **limits), clock)  # type: ignore[arg-type]


def test_a_minutes_requests_come_at_once_and_the_next_one_at_the_rate(clock: Clock) -> None:
    one = account(clock, requests_per_minute=3)
    for _ in range(3):
        one.take_request()
    with pytest.raises(Refusal) as refused:
        one.take_request()
    assert refused.value.status == 429
    assert (refused.value.kind, refused.value.code) == ("requests", "rate_limit_exceeded")
    assert refused.value.headers == {"Retry-After": "20", "Retry-After-Ms": "20000"}
    assert refused.value.message == (
        "Rate limit reached for tenant `a` on requests per min (RPM): Limit 3, Used 3, Requested 1. "
        "Please try again in 20s."
    )
    clock.now += 20
    one.take_request()


def test_over_time_nobody_has_more_than_the_rate(clock: Clock) -> None:
    one, num_taken = account(clock, requests_per_minute=60), 0
    for _ in range(1000):
        clock.now += 0.1
        try:
            one.take_request()
            num_taken += 1
        except Refusal:
            pass
    assert num_taken == 60 + 100 - 1  # a full bucket, and what came in 100 s but for a rest of one


def test_an_answers_tokens_are_owed_and_made_up(clock: Clock) -> None:
    one = account(clock, tokens_per_minute=600)
    one.take_request()
    one.take_tokens(500)
    one.spend(400)  # 300 below
    with pytest.raises(Refusal, match=r"tokens per min \(TPM\)") as refused:
        one.take_request()
    assert (refused.value.kind, refused.value.headers["Retry-After"]) == ("tokens", "31")
    assert one.headers()["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 31
    one.take_request()


def left(one: Account) -> int:
    return int(one.headers()["x-ratelimit-remaining-tokens"])


def test_what_an_answer_may_have_is_reserved_and_what_it_did_not_use_given_back(clock: Clock) -> None:
    one = account(clock, tokens_per_minute=600)
    first, second = one.enter(1), one.enter(1)
    first.take(100, 300)
    assert left(one) == 200
    with pytest.raises(Refusal, match="Limit 600, Used 400, Requested 201"):
        second.take(101, 100)
    second.take(100, 100)
    first.spend(50)
    assert left(one) == 0
    first.leave()
    first.leave()
    assert left(one) == 250
    second.spend(130)  # more than it said
    assert left(one) == 220
    second.settle(90, 120)
    second.leave()
    assert left(one) == 240  # 600 - 150 - 210


def test_who_has_no_limit_by_tokens_gets_nothing_back(clock: Clock) -> None:
    one = account(clock)
    place = one.enter(1)
    place.take(100, 300)
    one.tenant = Tenant(name="a", tokens_per_minute=600)
    one.take_tokens(500)
    place.leave()
    assert left(one) == 100


def test_a_request_that_may_have_more_than_a_minutes_tokens_is_refused_for_good(clock: Clock) -> None:
    with pytest.raises(Refusal, match="Request too large") as refused:
        account(clock, tokens_per_minute=600).enter(1).take(100, 501)
    assert refused.value.headers == {"X-Should-Retry": "false"}


def test_a_prompt_larger_than_a_minute_is_told_that_waiting_does_not_help(clock: Clock) -> None:
    with pytest.raises(Refusal, match="Request too large") as refused:
        account(clock, tokens_per_minute=600).take_tokens(601)
    assert refused.value.headers == {"X-Should-Retry": "false"}


def test_headers_tell_what_is_left_and_when_all_is_back(clock: Clock) -> None:
    one = account(clock, requests_per_minute=60, tokens_per_minute=6000)
    one.take_request()
    one.take_tokens(1000)
    assert one.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5000",
        "x-ratelimit-reset-tokens": "10s",
    }
    assert account(clock).headers() == {}


def test_limits_that_change_keep_what_was_used(clock: Clock) -> None:
    one = account(clock, requests_per_minute=10)
    for _ in range(10):
        one.take_request()
    one.tenant = Tenant(name="a", requests_per_minute=15)
    for _ in range(5):
        one.take_request()
    with pytest.raises(Refusal):
        one.take_request()
    one.tenant = Tenant(name="a", requests_per_minute=1)
    clock.now += 60
    one.take_request()
    with pytest.raises(Refusal):
        one.take_request()


def test_requests_at_once_and_what_may_wait_are_bounded(clock: Clock) -> None:
    one = account(clock, max_requests=2, max_queue=4)
    first = one.enter(3)
    with pytest.raises(Refusal, match="sequences that wait: Limit 4, Used 3, Requested 2"):
        one.enter(2)
    first.start()
    second = one.enter(2)
    with pytest.raises(Refusal, match="requests at once: Limit 2, Used 2"):
        one.enter(1)
    second.leave()
    one.enter(1).leave()
    with pytest.raises(Refusal, match="too large"):
        account(clock).enter(9, max_queue=8)


def test_a_place_that_is_dropped_is_left(clock: Clock) -> None:
    one = account(clock, max_requests=1)
    one.enter(1)
    gc.collect()
    one.enter(1)


def test_what_waits_is_counted_for_the_tenant_and_for_all(clock: Clock) -> None:
    one, other, both = account(clock), account(clock), Tally()
    first, second = one.enter(3, both), other.enter(2, both)
    first.start()
    assert (one.num_waiting, other.num_waiting, both.num_waiting, both.num_open) == (2, 2, 4, 2)
    first.leave()
    first.start()  # too late to count
    assert (one.num_open, one.num_waiting, both.num_waiting, both.num_open) == (0, 0, 2, 1)
    del second
    gc.collect()
    assert (other.num_open, both.num_waiting, both.num_open) == (0, 0, 0)


def test_a_bucket_is_never_fuller_than_a_minute() -> None:
    bucket = Bucket(0.0)
    assert bucket.level(10, 0.0) == 10
    bucket.spend(4, 10, 0.0)
    assert bucket.level(10, 1e6) == 10
    assert bucket.wait_s(11, 10, 1e6) == math.inf


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0121, "13ms"), (1, "1s"), (1.5, "1.5s"), (60, "1m0s"), (359.2, "6m0s"), (3723, "1h2m3s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
