"""The verbs `trace` and `simulate`, and simulations in processes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.sim.builders import make_config
from toppings.lab.simulation.cli import app
from toppings.sim.runs import SimJob, run_jobs
from toppings.sim.synth.workload import Workload

SMALL = ("--synth", "poisson-chat", "--rate", "10", "--duration", "5", "--adapters", "20")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_synthesized_trace_is_described(tmp_path: Path) -> None:
    path = str(tmp_path / "t.csv")
    assert "wrote" in run(
        "trace", "synth", path, "--rate", "20", "--duration", "30", "--popularity", "zipf:1.1"
    )
    description = json.loads(run("trace", "describe", path, "--json"))
    assert description["num_requests"] > 100
    assert set(description["dispersion"]) == {"1", "10", "60"}
    assert "index of dispersion, 1 s" in run("trace", "describe", path)


def test_policies_are_compared_on_a_workload() -> None:
    policies = "random,rank_aware"
    report = json.loads(
        run("simulate", *SMALL, "--instances", "2", "--policies", policies, "--processes", "1", "--json")
    )
    assert [row["policy"] for row in report["runs"]] == ["random", "rank_aware"]
    assert all(row["num_ended"] == row["num_arrived"] > 20 for row in report["runs"])
    assert report["config"]["num_instances"] == 2


def test_a_trace_file_is_simulated_and_the_seeds_are_summed_up(tmp_path: Path) -> None:
    path = str(tmp_path / "t.csv")
    run("trace", "synth", path, "--rate", "10", "--duration", "5")
    table = run("simulate", "--trace", path, "--policies", "random", "--seeds", "2", "--processes", "1")
    assert "2 runs" in table


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("simulate",), "give either --trace FILE or --synth WORKLOAD"),
        (("simulate", "--synth", "busy"), "unknown workload 'busy'; choose one of poisson-chat"),
        (("simulate", *SMALL, "--policies", "best"), "policy is 'best'; choose one of"),
        (("simulate", *SMALL, "--slo", "quick"), "slo is 'quick'"),
        (("simulate", *SMALL, "--ranks", "8;16"), "ranks are '8;16'; write numbers with commas"),
        (("simulate", *SMALL, "--perf-model", "no.json"), "cannot read performance model 'no.json'"),
        (("simulate", "--trace", "t.csv", "--drift", "3"), "--arrivals, --drift and --turns are"),
    ],
)
def test_what_a_user_did_wrong_is_said(arguments: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_tenants_of_a_trace_are_told_apart(tmp_path: Path) -> None:
    rows = "".join(f"{i / 100},a,8,200,40,{'flood' if i % 10 else 'guest'},1\n" for i in range(300))
    head = "arrival_s,adapter,rank,prompt_tokens,response_tokens,tenant,weight"
    (tmp_path / "t.csv").write_text(f"{head}\n{rows}")
    means = {}
    for policy in ("fair", "fcfs"):
        options = ["--policies", "first_fit", "--max-num-seqs", "4", "--scheduling-policy", policy]
        result = json.loads(run("simulate", "--trace", str(tmp_path / "t.csv"), "--json", *options))
        tenants = {each["name"]: each for each in result["runs"][0]["tenants"]}
        assert {name: each["num_ended"] for name, each in tenants.items()} == {"guest": 30, "flood": 270}
        means[policy] = tenants["guest"]["ttft_ms"]["mean"]
    assert means["fair"] < means["fcfs"] / 3
    assert "guest" in run("simulate", "--trace", str(tmp_path / "t.csv"), "--policies", "first_fit")


def test_figures_are_written_with_the_numbers_behind_them(tmp_path: Path) -> None:
    run("simulate", *SMALL, "--policies", "random", "--figures", str(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"attainment.pdf", "attainment.png", "tpt.pdf", "tpt.png", "simulation.json"}


def test_a_figure_of_a_trace_is_written(tmp_path: Path) -> None:
    run("trace", "synth", str(tmp_path / "t.csv"), "--duration", "30")
    run("trace", "describe", str(tmp_path / "t.csv"), "--figures", str(tmp_path / "figures"))
    assert (tmp_path / "figures" / "trace.png").stat().st_size > 1000


# --- processes ---


def make_job(policy: str = "random", seed: int = 0) -> SimJob:
    config = make_config(policy=policy, seed=seed, max_model_len=4200)
    return SimJob(config, Workload(rate=5.0, duration_s=4.0))


def test_processes_give_the_results_of_one_process_in_the_jobs_order() -> None:
    jobs = [make_job(seed=seed) for seed in range(3)]
    progress: dict[int, float] = {}
    apart = run_jobs(jobs, num_processes=2, on_progress=lambda index, share: progress.update({index: share}))
    together = run_jobs(jobs, num_processes=1)
    assert [r.ended_at.tolist() for r in apart] == [r.ended_at.tolist() for r in together]
    assert set(progress) == {0, 1, 2}


def test_a_job_that_is_wrong_in_its_process_says_why() -> None:
    bad = SimJob(make_config(), Workload(lengths="short"))
    with pytest.raises(ValueError, match="unknown lengths 'short'"):
        run_jobs([bad, bad], num_processes=2)
