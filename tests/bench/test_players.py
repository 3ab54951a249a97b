"""The same trace over HTTP and through the simulator: what players tell of its requests."""

from multiprocessing.connection import Connection

import pytest

from tests.bench.fake_server import Script, serving
from tests.sim.builders import make_config, make_trace
from toppings.lab.child import child
from toppings.lab.http.apis import CompletionsApi
from toppings.lab.http.client import LoadClient
from toppings.lab.players import Player
from toppings.lab.players.http import HttpPlayer
from toppings.lab.players.simulator import SimulatorPlayer
from toppings.lab.workload import calls_of

TRACE = make_trace(
    [0.0, 0.01, 0.02], prompt=(8, 9, 10), response=(2, 3, 4), adapters=(0, 1, 0), ranks=(8, 16)
)


def told_by(player: Player) -> list[tuple[str, int, int | None, str | None]]:
    outcomes = player.play(TRACE)
    assert all(outcome.ttft_ms is not None and 0 < outcome.ttft_ms <= outcome.e2e_ms for outcome in outcomes)
    return [(o.adapter, o.num_tokens, o.num_prompt_tokens, o.error) for o in outcomes]


def test_players_tell_the_same_of_the_same_requests() -> None:
    with serving(Script()) as url:
        over_http = told_by(HttpPlayer(LoadClient(url, CompletionsApi(ignores_eos=True))))
    assert over_http == told_by(SimulatorPlayer(make_config()))
    assert over_http[1] == ("adapter-1", 3, 9, None)


def test_calls_of_a_trace_are_its_requests_with_the_same_prompts_each_time() -> None:
    calls = calls_of(TRACE)
    assert [(c.adapter, len(c.prompt), c.max_tokens, c.send_at) for c in calls] == [
        ("adapter-0", 8, 2, 0.0),
        ("adapter-1", 9, 3, 0.01),
        ("adapter-0", 10, 4, 0.02),
    ]
    assert calls == calls_of(TRACE)


# --- processes that are asked ---


def count(pipe: Connection, start: int) -> None:
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        if number < 0:
            raise SystemExit(1)
        pipe.send(start + number)


def test_a_child_answers_until_it_is_left() -> None:
    with child(count, 10) as counter:
        assert counter.told == "ready"
        assert [counter.ask(number) for number in (1, 2)] == [11, 12]


def test_a_child_that_ends_early_is_told() -> None:
    with pytest.raises(RuntimeError, match="ended early"), child(count, 10) as counter:
        counter.ask(-1)
