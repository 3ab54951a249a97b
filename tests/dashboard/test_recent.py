"""Rates and percentiles of the last minutes, on a clock of the test's own."""

import random

import numpy as np
import pytest

from toppings.dashboard.recent import FLOOR_S, NUM_SLOTS, SLOT_S, WINDOW_SLOTS, Recent

CLOSE = 0.025
"""Half a bucket, and the rounding to three digits."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recent(clock: Clock) -> Recent:
    return Recent(clock)


def test_percentiles_are_those_of_the_values(recent: Recent) -> None:
    draw = random.Random(1)
    values = [draw.lognormvariate(-2, 1.5) for _ in range(5000)]
    for value in values:
        recent.note_ttft(value)
    told = recent.latency()["ttft"]
    assert told["num"] == len(values)
    for name, share in (("p50_ms", 50), ("p99_ms", 99)):
        assert told[name] == pytest.approx(
            1e3 * np.percentile(values, share, method="inverted_cdf"), rel=CLOSE
        )


def test_one_value_is_all_percentiles_and_none_is_none(recent: Recent) -> None:
    assert recent.latency()["tpt"] == {"num": 0, "p50_ms": None, "p99_ms": None}
    recent.note_tpt(0.02)
    told = recent.latency()["tpt"]
    assert told["p50_ms"] == told["p99_ms"] == pytest.approx(20, rel=CLOSE)


@pytest.mark.parametrize("seconds", [0.0, -1.0, FLOOR_S / 10, 1e9])
def test_what_no_bucket_is_for_counts_in_the_outermost(recent: Recent, seconds: float) -> None:
    recent.note_ttft(seconds)
    assert recent.latency()["ttft"]["num"] == 1


def test_percentiles_are_of_the_last_minute(recent: Recent, clock: Clock) -> None:
    recent.note_ttft(8.0)
    clock.now += SLOT_S * WINDOW_SLOTS
    recent.note_ttft(1.0)
    assert recent.latency()["ttft"]["num"] == 2
    clock.now += SLOT_S
    assert recent.latency()["ttft"]["num"] == 1


def test_a_rate_is_what_came_by_the_time_it_took(recent: Recent, clock: Clock) -> None:
    for _ in range(30):
        recent.note_tokens(7)
        clock.now += 1.0
    assert recent.rates()["tokens_per_s"] == pytest.approx(7, rel=0.01)
    clock.now += 2 * SLOT_S
    assert recent.rates()["tokens_per_s"] == 0


def test_history_has_whole_slots_and_gaps_where_nothing_was(recent: Recent, clock: Clock) -> None:
    for slot in range(3):
        recent.note_tokens(SLOT_S * (slot + 1))
        recent.note_prompt(SLOT_S)
        recent.note_tpt(0.1 * (slot + 1))
        clock.now += 2 * SLOT_S
    told = recent.history()
    assert {len(values) for name, values in told.items() if name != "slot_s"} == {NUM_SLOTS}
    assert told["tokens_per_s"][-6:] == [1, 0, 2, 0, 3, 0]
    assert told["prompt_tokens_per_s"][-6:] == [1, 0, 1, 0, 1, 0]
    assert told["tpt_p50_ms"][-6::2] == [pytest.approx(100 * n, rel=CLOSE) for n in (1, 2, 3)]
    assert told["tpt_p50_ms"][-5::2] == [None] * 3


@pytest.mark.parametrize("slots", [NUM_SLOTS + 1, NUM_SLOTS + 2, 1_000_000])
def test_what_is_older_than_the_history_is_forgotten(recent: Recent, clock: Clock, slots: int) -> None:
    recent.note_tokens(5)
    recent.note_ttft(1.0)
    recent.note_end("stop")
    clock.now += SLOT_S * slots
    told = recent.history()
    assert set(told["tokens_per_s"]) == {0}
    assert set(told["ttft_p50_ms"]) == {None}
    assert recent.outcomes == {"stop": 1}
