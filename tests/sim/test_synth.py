"""Generated load has the dispersion, quantiles and popularity it is named for.

Where a test is statistical, its tolerance is 4.5 standard deviations of the statistic, measured over 60
seeds: a right generator would fail with about one seed in 150,000 (were the statistic normal).
"""

import numpy as np
import pytest

from toppings.lab.simulation.describe import describe, dispersion
from toppings.sim.seeds import generator
from toppings.sim.synth.arrivals import make_arrivals
from toppings.sim.synth.lengths import draw_lengths
from toppings.sim.synth.popularity import drift, popularity
from toppings.sim.synth.workload import PRESETS, Workload
from toppings.sim.trace import FloatArray

Statistics = tuple[float, float, float, float, float]


def statistics(arrivals_s: FloatArray, duration_s: float) -> Statistics:
    """Rate, CV of the gaps, index of dispersion at 1, 10 and 60 s."""
    gaps = np.diff(arrivals_s)
    spread = [dispersion(arrivals_s, window, duration_s) or 0.0 for window in (1, 10, 60)]
    return len(arrivals_s) / duration_s, float(gaps.std() / gaps.mean()), spread[0], spread[1], spread[2]


@pytest.mark.parametrize(
    ("spec", "rate", "duration_s", "expected", "deviation"),
    [
        ("poisson", 20.0, 5000.0, (20.0, 1.0, 1.0, 1.0, 1.0), (0.063, 0.003, 0.02, 0.063, 0.15)),
        ("gamma:4", 20.0, 2000.0, (20.0, 4.0, 14.0, 15.6, 15.8), (0.44, 0.06, 0.52, 1.7, 3.0)),
        ("code", 2.57, 20000.0, (2.57, 13.2, 13.2, 83.5, 154.0), (0.154, 0.41, 0.13, 1.6, 12.8)),
        ("conversation", 5.53, 40000.0, (5.53, 1.07, 1.40, 3.95, 16.0), (0.12, 0.007, 0.042, 0.4, 2.4)),
    ],
)
def test_arrivals_have_the_stated_rate_variation_and_dispersion(
    spec: str, rate: float, duration_s: float, expected: Statistics, deviation: Statistics
) -> None:
    arrivals_s = make_arrivals(spec)(rate, duration_s, generator(0, "test"))
    for value, right, spread in zip(statistics(arrivals_s, duration_s), expected, deviation):
        assert abs(value - right) < 4.5 * spread


@pytest.mark.parametrize(
    ("preset", "recorded"),
    [("azure-code-like", (13.2, 72.0, 164.0)), ("azure-conversation-like", (1.39, 3.9, 16.0))],
)
def test_azure_like_arrivals_are_about_as_bursty_as_the_recorded_ones(
    preset: str, recorded: tuple[float, float, float]
) -> None:
    workload = PRESETS[preset]
    arrivals_s = make_arrivals(workload.arrivals)(workload.rate, 40000.0, generator(1, "test"))
    for window, value in zip((1, 10, 60), recorded):
        assert dispersion(arrivals_s, window, 40000.0) == pytest.approx(value, rel=0.4)


def test_code_arrivals_keep_their_variation_at_another_rate() -> None:
    arrivals_s = make_arrivals("code")(50.0, 2000.0, generator(2, "test"))
    assert abs(statistics(arrivals_s, 2000.0)[1] - 13.2) < 4.5 * 0.29


@pytest.mark.parametrize(("rate", "counts"), [(3.0, [3, 3, 3, 3]), (2.5, [2, 3, 2, 3]), (0.5, [0, 1, 0, 1])])
def test_even_arrivals_are_spaced_evenly_within_each_second(rate: float, counts: list[int]) -> None:
    arrivals_s = make_arrivals("even")(rate, 4.0, generator(0, "test"))
    assert np.bincount(arrivals_s.astype(int), minlength=4).tolist() == counts
    within = arrivals_s[arrivals_s.astype(int) == 1] - 1
    assert np.allclose(within, np.arange(counts[1]) / counts[1])


@pytest.mark.parametrize("spec", ["poisson", "even", "gamma:0.5", "gamma:9", "code", "conversation"])
def test_arrivals_ascend_within_the_duration(spec: str) -> None:
    arrivals_s = make_arrivals(spec)(30.0, 7.5, generator(5, "test"))
    assert (np.diff(arrivals_s) >= 0).all()
    assert arrivals_s.min(initial=0.0) >= 0
    assert arrivals_s.max(initial=0.0) < 7.5


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("bursts", "unknown arrivals 'bursts'; choose one of poisson, even"),
        ("gamma", "lacks a number; write gamma:N"),
        ("gamma:x", "'x' is not a number above 0"),
        ("gamma:-1", "'-1' is not a number above 0"),
        ("poisson:3", "has 1 numbers; poisson takes at most 0"),
    ],
)
def test_a_text_that_names_no_arrivals_is_refused(spec: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_arrivals(spec)


def test_published_popularity_gives_the_top_tenth_70_to_73_percent() -> None:
    for num_adapters in (128, 256, 512):
        shares = popularity("published", num_adapters)
        assert 0.70 <= shares[: num_adapters // 10].sum() <= 0.735


def test_popularities_follow_their_formulas() -> None:
    assert popularity("zipf:1.5", 3) * (1 + 2**-1.5 + 3**-1.5) == pytest.approx([1, 2**-1.5, 3**-1.5])
    assert popularity("zipf", 2) == pytest.approx([2 / 3, 1 / 3])
    assert popularity("geometric", 3) == pytest.approx([9 / 19, 6 / 19, 4 / 19])
    assert popularity("uniform", 4) == pytest.approx([0.25] * 4)
    x = (np.array([1, 2]) - 0.5) / 2
    curve = np.exp(-8.6 * x**0.58)
    assert popularity("published", 2) == pytest.approx(curve / curve.sum())


def test_drawn_adapters_follow_the_popularity() -> None:
    trace = Workload(rate=1000.0, duration_s=100.0, num_adapters=16, popularity="zipf:1").make_trace(0)
    counts, shares = np.bincount(trace.adapters, minlength=16), popularity("zipf:1", 16)
    expected = shares * len(trace)
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 49.0  # 15 degrees of freedom: exceeded once in 57,000 seeds


def test_drift_exchanges_the_popularity_of_a_tenth_of_the_adapters_at_each_step() -> None:
    arrivals_s = np.repeat([0.5, 1.5, 2.5], 20)
    drawn = np.tile(np.arange(20, dtype=np.int32), 3)
    drifted = drift(drawn, arrivals_s, 20, 1.0, generator(0, "test")).reshape(3, 20)
    assert drifted[0].tolist() == list(range(20))
    assert [int((drifted[i] != drifted[i + 1]).sum()) for i in range(2)] == [2, 2]
    assert all(sorted(row) == list(range(20)) for row in drifted.tolist())


def test_drift_leaves_arrivals_and_lengths_as_they_were() -> None:
    steady, drifting = (Workload(rate=50.0, drift_s=s, num_adapters=50).make_trace(0) for s in (0.0, 10.0))
    assert steady.arrivals_s.tolist() == drifting.arrivals_s.tolist()
    assert steady.response_tokens.tolist() == drifting.response_tokens.tolist()
    assert steady.adapters.tolist() != drifting.adapters.tolist()


def test_chat_lengths_have_the_published_means() -> None:
    prompt, response = draw_lengths("chat", 100_000, generator(0, "test"))
    # deviations of the means: 69.5 * 1.31 / sqrt(100000) = 0.29 and 214.5 * 0.95 / sqrt(100000) = 0.64
    assert abs(prompt.mean() - 69.5) < 4.5 * 0.29
    assert abs(response.mean() - 214.5) < 4.5 * 0.64


@pytest.mark.parametrize(
    ("spec", "prompt_law", "response_law"),
    [
        ("azure_code", (7.00, 1.36, 7436), (2.79, 0.85, 251)),
        ("azure_conversation", (6.63, 0.99, 4142), (5.02, 0.86, 601)),
    ],
)
def test_azure_lengths_have_the_quantiles_of_their_lognormal_up_to_the_cut(
    spec: str, prompt_law: tuple[float, float, int], response_law: tuple[float, float, int]
) -> None:
    drawn = draw_lengths(spec, 100_000, generator(0, "test"))
    for tokens, (mu, sigma, longest) in zip(drawn, (prompt_law, response_law)):
        for share, z, density in ((0.1, -1.2816, 0.1755), (0.5, 0.0, 0.3989), (0.9, 1.2816, 0.1755)):
            deviation = (
                np.sqrt(share * (1 - share) / 100_000) / density * sigma
            )  # of the quantile's logarithm
            expected = min(mu + z * sigma, np.log(longest))
            half_token = 0.5 / np.exp(expected)
            assert abs(np.log(np.quantile(tokens, share)) - expected) < 4.5 * deviation + half_token
        assert 1 <= tokens.min() <= tokens.max() == longest


def test_fixed_lengths_are_fixed() -> None:
    prompt, response = draw_lengths("fixed:128:64", 3, generator(0, "test"))
    assert (prompt.tolist(), response.tolist()) == ([128] * 3, [64] * 3)


@pytest.mark.parametrize("spec", ["fixed", "fixed:1", "fixed:1.5:2", "long"])
def test_a_text_that_names_no_lengths_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"lengths"):
        draw_lengths(spec, 1, generator(0, "test"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_the_same_trace_for_the_same_seed(name: str) -> None:
    first, again, other = (PRESETS[name].make_trace(seed) for seed in (4, 4, 5))
    for column in ("arrivals_s", "adapters", "prompt_tokens", "response_tokens", "ranks"):
        assert np.array_equal(getattr(first, column), getattr(again, column))
    assert not np.array_equal(first.prompt_tokens, other.prompt_tokens)


@pytest.mark.parametrize("field", ["rate", "duration_s"])
def test_a_workload_without_rate_or_duration_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 0.0; it must be above 0"):
        Workload(**{field: 0.0})  # type: ignore[arg-type]


def test_a_description_counts_what_is_there() -> None:
    trace = Workload(rate=10.0, duration_s=200.0, num_adapters=10, ranks=(8, 64)).make_trace(0)
    description = describe(trace)
    assert description.num_requests == len(trace)
    assert description.rate == pytest.approx(len(trace) / 200.0)
    assert description.prompt_tokens.p50 == np.percentile(trace.prompt_tokens, 50)
    assert sum(description.rank_share.values()) == pytest.approx(1.0)
    most = np.bincount(trace.adapters).max() / len(trace)
    assert description.top_share == pytest.approx({1: most, 10: most})


def test_dispersion_is_variance_over_mean_of_whole_windows() -> None:
    arrivals_s = np.array([0.1, 0.2, 0.3, 1.5, 2.0, 3.9, 4.1])
    assert dispersion(arrivals_s, 1.0, 4.5) == pytest.approx(np.var([3, 1, 1, 1]) / 1.5)
    assert dispersion(arrivals_s, 3.0, 4.5) is None
