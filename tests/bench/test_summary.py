import pytest

from toppings.lab.outcome import Outcome
from toppings.lab.summary import Stats, summarize

GOOD = [Outcome("a", float(i), 100.0 * (i + 1), 10.0 * (i + 1), 10, 64) for i in range(4)]
BAD = Outcome("b", 10.0, 500.0, error="broken")


def test_percentiles_are_interpolated_between_neighbours() -> None:
    assert Stats.of([0.0, 20.0, 10.0]).p50 == 10.0
    assert Stats.of([0.0, 10.0]).p99 == pytest.approx(9.9)
    assert Stats.of([7.0]).p99 == 7.0


def test_latencies_are_of_requests_that_succeeded() -> None:
    summary = summarize([*GOOD, BAD])
    for latency, unit in ((summary.e2e, 10.0), (summary.ttft, 1.0), (summary.tpt, 1.0)):
        assert latency is not None
        assert latency.named() == pytest.approx({"mean": 25 * unit, "p50": 25 * unit, "p99": 39.7 * unit})


def test_errors_are_counted_by_reason() -> None:
    summary = summarize([*GOOD, BAD, BAD])
    assert (summary.num_requests, summary.num_errors, summary.errors) == (6, 2, {"broken": 2})


def test_total_time_is_from_the_first_sending_to_the_last_end() -> None:
    assert summarize([*GOOD, BAD]).total_s == pytest.approx(10.5)
    assert summarize(GOOD).total_s == pytest.approx(3.4)


def test_average_time_is_the_mean_of_whole_requests() -> None:
    assert summarize(GOOD).average_s == pytest.approx(0.25)


def test_only_failures_have_no_latency() -> None:
    summary = summarize([BAD])
    assert (summary.ttft, summary.e2e, summary.average_s) == (None, None, None)


def test_ratios_are_taken_latency_by_latency() -> None:
    doubled = [Outcome("a", o.sent_at, 2 * o.e2e_ms, o.ttft_ms, o.num_tokens) for o in GOOD]
    ratios = summarize(doubled).ratios_to(summarize(GOOD))
    assert ratios["e2e"] == {"mean": 2.0, "p50": 2.0, "p99": 2.0}
    assert ratios["ttft"]["mean"] == 1.0


def test_nothing_to_summarize_is_an_error() -> None:
    with pytest.raises(ValueError, match="no outcomes"):
        summarize([])


def test_the_json_names_the_unit_of_latencies() -> None:
    content = summarize(GOOD).to_json()
    assert content["ttft"] == pytest.approx({"mean_ms": 25.0, "p50_ms": 25.0, "p99_ms": 39.7})
    assert summarize([BAD]).to_json()["ttft"] is None
