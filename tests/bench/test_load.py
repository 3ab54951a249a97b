import asyncio
import time
from collections import Counter
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest

from tests.bench.fake_server import Script, serving
from toppings.lab.http.apis import CompletionsApi
from toppings.lab.http.client import LoadClient
from toppings.lab.outcome import Outcome
from toppings.lab.players.http import run_load
from toppings.lab.workload import LoadShape, make_calls, poisson_arrivals
from toppings.sim.synth.popularity import published

NAMES = [f"adapter-{i}" for i in range(10)]


def _run(script: Script, shape: LoadShape, names: list[str]) -> tuple[list[Outcome], int]:
    num_done = 0

    def on_done() -> None:
        nonlocal num_done
        num_done += 1

    async def run(url: str) -> list[Outcome]:
        async with LoadClient(url, CompletionsApi(ignores_eos=True)) as client:
            calls = make_calls(shape, names)
            return await run_load(client, calls, is_sequential=not shape.rps, on_done=on_done)

    with serving(script) as url:
        return asyncio.run(run(url)), num_done


def test_in_turn_no_adapter_comes_again_before_all_others_came() -> None:
    calls = make_calls(LoadShape(num_requests=20), NAMES, first=3)
    assert [call.adapter for call in calls] == (NAMES * 3)[3:23]


def test_the_same_seed_makes_the_same_load_and_another_seed_another() -> None:
    shape = LoadShape(num_requests=20, rps=5.0)
    assert make_calls(shape, NAMES) == make_calls(shape, NAMES)
    assert make_calls(shape, NAMES) != make_calls(replace(shape, seed=1), NAMES)


def test_prompts_have_the_length_that_was_asked_for() -> None:
    [ids] = make_calls(LoadShape(num_requests=1, prompt_tokens=40), NAMES)
    [text] = make_calls(LoadShape(num_requests=1, prompt_tokens=40, prompt_form="text"), NAMES)
    assert len(ids.prompt) == 40
    assert isinstance(text.prompt, str)
    assert len(text.prompt.split()) == 40


def test_poisson_gaps_have_mean_and_deviation_of_one_over_the_rate() -> None:
    """With a fixed seed; another one would fail with probability below 1e-4 (5 % is 5 standard errors)."""
    arrivals = poisson_arrivals(10_000, 4.0, np.random.default_rng(0)).tolist()
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals)]
    assert mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert mean((gap - 0.25) ** 2 for gap in gaps) ** 0.5 == pytest.approx(0.25, rel=0.05)


def test_published_popularity_gives_a_tenth_of_the_adapters_about_70_percent() -> None:
    assert 0.69 <= published(512)[:51].sum() <= 0.74


def test_published_popularity_is_drawn() -> None:
    calls = make_calls(LoadShape(num_requests=2000, popularity="published"), NAMES)
    counts = Counter(call.adapter for call in calls)
    assert counts[NAMES[0]] / 2000 == pytest.approx(published(10)[0], abs=0.05)


def test_one_after_another_never_has_two_requests_open() -> None:
    script = Script(first_token_s=0.005)
    outcomes, _ = _run(script, LoadShape(num_requests=8, max_tokens=2), NAMES)
    assert script.most_open == 1
    assert [o.adapter for o in outcomes] == NAMES[:8]


def test_poisson_arrivals_do_not_wait_for_answers() -> None:
    script = Script(num_awaited=20)
    outcomes, num_done = _run(script, LoadShape(num_requests=20, rps=200.0, max_tokens=2), NAMES)
    assert num_done == len(outcomes) == 20
    assert not any(outcome.error for outcome in outcomes)


def test_poisson_requests_are_never_sent_before_their_time() -> None:
    shape = LoadShape(num_requests=10, rps=100.0, max_tokens=1)
    started_at = time.perf_counter()
    outcomes, _ = _run(Script(), shape, NAMES)
    for call, outcome in zip(make_calls(shape, NAMES), outcomes, strict=True):
        assert outcome.sent_at >= started_at + call.send_at


def test_failed_requests_are_outcomes_too() -> None:
    outcomes, num_done = _run(
        Script(), LoadShape(num_requests=6, rps=100.0, max_tokens=3), ["a", "cut", "refused"]
    )
    assert [o.error is None for o in outcomes] == [True, False, False] * 2
    assert num_done == 6


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("num_requests", 0, "num_requests is 0; it must be at least 1"),
        ("rps", -1.0, "rps is -1.0; it must be at least 0"),
        ("popularity", "zipf", "choose one of in_turn, uniform, published"),
        ("prompt_form", "sound", "choose one of ids, text"),
    ],
)
def test_a_load_out_of_range_is_refused_with_its_value(name: str, value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LoadShape(**{name: value})  # type: ignore[arg-type]


def test_no_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapter"):
        make_calls(LoadShape(), [])
