"""`toppings plan fleet`: the smallest fleet that keeps the objectives, found by simulation."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.sim.builders import FLAT, simulate
from toppings.lab.capacity.cli import app
from toppings.lab.capacity.search import smallest
from toppings.lab.capacity.spec import PlanSpec
from toppings.lab.simulation.metrics import attainment_of
from toppings.sim.settings import SimConfig
from toppings.sim.synth.workload import Workload

# --- the search ---


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_smallest_number_is_found_with_few_questions(width: int) -> None:
    rng = Random(width)
    for _ in range(300):
        most = rng.randint(1, 300)
        wanted, guess, stride = rng.randint(1, most), rng.randint(1, 400), rng.randint(1, 30)
        rounds: list[Sequence[int]] = []

        def holds(numbers: Sequence[int], wanted: int = wanted, rounds: list[Any] = rounds) -> list[bool]:
            rounds.append(numbers)
            return [number >= wanted for number in numbers]

        assert smallest(holds, guess, stride=stride, most=most, width=width) == wanted
        asked = [number for numbers in rounds for number in numbers]
        assert len(asked) == len(set(asked))
        assert all(1 <= number <= most for number in asked)
        assert len(rounds) <= 20


def test_what_holds_for_no_number_is_none_and_of_contradicting_answers_the_largest_failure_counts() -> None:
    assert smallest(lambda numbers: [False] * len(numbers), 3, stride=1, most=50, width=2) is None
    fails = {1, 2, 3, 4, 7}  # 5 and 6 hold by chance
    found = smallest(lambda numbers: [n not in fails for n in numbers], 6, stride=1, most=50, width=2)
    assert found is not None
    assert found in (5, 8)


# --- the plan ---

LOAD = ("--synth", "poisson-chat", "--rate", "60", "--duration", "8", "--lengths", "fixed:8:10")
SERVER = ("--max-num-seqs", "4", "--mode", "cached", "--adapters", "16")
WANTED = ("--slo-ttft-ms", "40", "--attainment", "0.9", "--seeds", "3")
FEW = ("--policies", "round_robin,least_loaded", "--placements", "none", "--pool-shares", "0.2")
SMALL = (*LOAD, *SERVER, *WANTED, *FEW, "--processes", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every step takes 10 ms, a request ten of them: a server of four sequences ends 40 requests/s."""
    path = tmp_path_factory.mktemp("model") / "flat.json"
    path.write_text(FLAT.to_json())
    return str(path)


def plan(model: str, *arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(
        app, [*SMALL, "--perf-model", model, "--json", *arguments], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)["plan"]
    return found


def attainments(found: dict[str, Any], seeds: Sequence[int], *, rate: float = 60.0) -> list[float]:
    """Of the planned fleet, with loads that it was not planned for."""
    workload = Workload(rate=rate, duration_s=8.0, num_adapters=16, lengths="fixed:8:10")
    shares = []
    for seed in seeds:
        config = SimConfig(
            perf_model=FLAT,
            policy=found["design"]["policy"],
            num_instances=found["num_instances"],
            mode="cached",
            max_num_seqs=4,
            seed=seed,
        )
        result = simulate(config, workload.make_trace(seed))
        shares.append(attainment_of(result, 40.0, float("inf")))
    return shares


@pytest.fixture(scope="module")
def forward(model: str) -> dict[str, Any]:
    return plan(model)


def test_a_plan_holds_for_loads_it_was_not_made_for_and_a_smaller_fleet_does_not(
    forward: dict[str, Any],
) -> None:
    """60 requests/s need one and a half servers at least, and some more for their bad moments."""
    assert forward["num_instances"] in (2, 3)
    unseen = attainments(forward, range(1000, 1012))
    assert sum(unseen) / len(unseen) == pytest.approx(forward["expected"]["attainment"], abs=0.01)
    fewer = attainments({**forward, "num_instances": forward["num_instances"] - 1}, range(1000, 1004))
    assert sum(fewer) / len(fewer) < 0.9


def test_costs_are_of_the_tokens_that_are_served(forward: dict[str, Any], model: str) -> None:
    tokens_per_hour = forward["rate"] * 18 * 3600 / 1e6
    assert forward["cost_per_hour"] == forward["num_instances"] * 2.5
    assert forward["cost_of_tokens"] == pytest.approx(forward["cost_per_hour"] / tokens_per_hour, rel=0.1)
    assert forward["cost_of_response_tokens"] == pytest.approx(1.8 * forward["cost_of_tokens"])


def test_the_load_that_a_fleet_holds_is_that_which_asks_for_the_fleet(
    forward: dict[str, Any], model: str
) -> None:
    found = plan(model, "--instances", str(forward["num_instances"]))
    assert found["num_instances"] == forward["num_instances"]
    assert found["rate"] > 0.97 * forward["rate"]
    assert found["sensitivity"]["load +20%"]["attainment"] < 0.9 <= found["expected"]["attainment"]
    held = attainments(found, range(2000, 2008), rate=found["rate"])
    assert sum(held) / len(held) > 0.89


def test_changes_of_the_load_and_a_lost_server_are_told(forward: dict[str, Any]) -> None:
    told = {name: each["attainment"] for name, each in forward["sensitivity"].items()}
    assert list(told) == ["load -20%", "load +20%", "one server lost"]
    assert told["load -20%"] >= forward["expected"]["attainment"] > told["one server lost"]


def test_a_plan_is_shown_as_tables_and_as_a_figure(model: str, tmp_path: Path) -> None:
    figure = tmp_path / "plan.png"
    arguments = [*SMALL, "--perf-model", model, "--figure", str(figure), "--policies", "least_loaded"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    for text in ("servers for", "within it", "with 3 unseen seeds", "cost per million tokens", "What if"):
        assert text in result.stdout
    assert figure.stat().st_size > 1000


def test_memory_is_divided_as_the_loads_adapters_want_it() -> None:
    spec = PlanSpec(slo_tpt_ms=50.0, memory_bytes=1000, kv_token_bytes=2, pool_shares=(0.2, 0.5))
    design = spec.first_design()
    assert (spec.pool_bytes(design), spec.kv_cache_tokens(design)) == (200, 400)
    assert [spec.pool_bytes(each) for each in spec.ways_to_divide(design)] == [200, 500]
    assert len(spec.ways_to_place(design)) == 8


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--slo-ttft-ms", "inf"), "there is no objective; give --slo-ttft-ms, --slo-tpt-ms or both"),
        (("--attainment", "1.5"), "attainment is 1.5; it must be above 0, at most 1"),
        (("--attainment", "nan"), "attainment is nan"),
        (("--slo-tpt-ms", "-3"), "slo_tpt_ms is -3"),
        (("--policies", "best"), "policies has 'best'; choose from rank_aware"),
        (("--placements", "none,there"), "placements has 'there'; choose from none, static_k"),
        (
            ("--pool-shares", "0.5,2"),
            r"pool_shares are \(0.5, 2.0\); give at least one, each between 0 and 1",
        ),
        (("--memory-bytes", "much"), "'much' is not a size"),
        (("--memory-bytes", "1KB"), "memory_bytes is 1000; beside adapters it holds 0 tokens"),
        (("--mode", "on_demand", "--memory-bytes", "90MB"), "pool_shares 0.2 of memory_bytes 90000000"),
        (("--instances", "-1"), "num_instances is -1; it must be at least 0"),
        (("--seeds", "1"), "seeds is 1; it must be at least 2"),
        (("--perf-model", "no.json"), "cannot read performance model 'no.json'"),
        (("--trace", "t.csv"), "give either --trace FILE or --synth WORKLOAD"),
        (
            ("--slo-ttft-ms", "5", "--max-instances", "3"),
            "TTFT 5 ms for 90.00% .* with 3 servers .* is 0.00%",
        ),
        (("--figure", "plan.xyz"), "its name must end in one of"),
    ],
)
def test_what_cannot_be_planned_is_said(
    arguments: tuple[str, ...], reason: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=reason):
        CliRunner().invoke(app, [*SMALL, "--perf-model", model, *arguments], catch_exceptions=False)


def test_a_trace_without_requests_is_refused(tmp_path: Path, model: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,adapter,rank,prompt_tokens,response_tokens\n1,a,8,8,4\n")
    arguments = ["--trace", str(path), "--slo-ttft-ms", "40", "--start", "2", "--perf-model", model]
    with pytest.raises(ValueError, match=r"window .* is not within|has no requests"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
