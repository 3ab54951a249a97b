"""Every benchmark runs at toy size and ends in one JSON line that names it and holds what it measured.

They run in this process, those for a GPU on the CPU: each would take seconds to import what is here already.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import get_num_threads, set_num_threads

from tests.ops.gpu_world import DEVICE, needs_triton
from tests.waiting import wait_until
from toppings.ops import dispatch

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
GPU_BENCHMARKS = ROOT / "benchmarks" / "gpu"
GPU_SCRIPTS = (
    *("correctness", "decode_step", "prefill", "load", "cold_start"),
    *("adapters_2000", "peft_throughput", "workloads"),
)
NOT_IN_A_BARE_PROCESS = (
    *("aiohttp", "fastapi", "httpx", "jinja2", "matplotlib", "msgspec", "numba", "prometheus_client"),
    *("psutil", "ray", "rich", "typer", "uvicorn", "zmq"),
)
TOY_ARGUMENTS = {
    "routing": ["--rates", "20", "--kernels", "mbgmv"],
    "soak": ["--faults", "registry"],  # tests/hostile has the others
}

Result = dict[str, Any]


def check_ipc(result: Result) -> None:
    assert len(result["us"]) == 2
    for row in result["us"].values():
        assert set(row) == {"shared memory", "UNIX socket", "TCP socket"}
        assert min(row.values()) > 0


def check_cpu_lora(result: Result) -> None:
    assert any(label.startswith("16 tokens") for label in result["times"])
    assert all(row["workers_ms"] > 0 and row["torch_ms"] > 0 for row in result["times"].values())
    assert result["peak_gflops"] > 0


def check_prefix_routing(result: Result) -> None:
    assert all(0 < row["choose_us"] < row["place_us"] for row in result["decisions"])
    cached = {row["case"]: row["cached"] for row in result["simulated"]}
    assert cached["rank_aware, on"] > cached["rank_aware, off"]
    assert cached["one server"] > 0


def check_slo_classes(result: Result) -> None:
    rows = {row["case"]: row for row in result["simulated"]}
    assert rows["batch"]["attained"] >= rows["alike"]["attained"]
    assert rows["batch"]["batch_done_s"] > 0
    assert not any(row["num_lost"] for row in rows.values())


def check_router_proxy(result: Result) -> None:
    for pattern in ("burst", "paced"):
        figures = result[pattern]
        assert figures["router_busy"] >= 0  # of a toy's time a busy machine counts no tick
        assert (figures["routed_pieces"] > 1) >= (pattern == "paced")  # passed on one by one


def check_soak(result: Result) -> None:
    requests = result["requests"]
    ended = requests["answered"] + sum(requests["refused"].values()) + requests["left"] + requests["cut"]
    assert requests["sent"] == ended > 0
    assert len(result["recovery_s"]["registry locked"]) == 1
    start, [end] = result["usage"]["start"], result["usage"]["after_phases"]
    assert start["num_processes"] == end["num_processes"] == 5
    assert set(end["rss_by_part"]) == {"server", "forker", "engine", "worker", "sandbox"}


def check_prefix_cache(result: Result) -> None:
    assert result["kept"]["recency"] == {"hits_over_lru": 1.0, "spared_over_lru": 1.0}
    assert result["trace"]["over_lru"] > 0.9
    assert 0.3 < result["trace"]["hit_share"] < result["trace"]["hit_share_unbounded"] < 1
    assert result["chat"]["computed_over_new"] < 1.1
    assert result["ttft"]["second_over_first"] > 0
    assert result["chain"]["ratio"] > 0
    assert result["overhead"]["engine_us_per_request"] > 0


def check_fuzz(result: Result) -> None:
    requests, adapters = result["requests"], result["adapters"]
    assert requests["sent"] == sum(requests["statuses"].values()) + requests["never_whole"]
    assert adapters["kinds"] == adapters["refused"] + adapters["served"] > 0
    assert result["serves_afterwards"]


def check_structured_output(result: Result) -> None:
    assert result["answers"]["valid"] == result["answers"]["schemas"] > 0
    assert result["refusals"]["accepted"] == []
    assert result["masks"]["num_masks"] > 0
    assert result["throughput"]["ratio"] > 0


def check_fairness(result: Result) -> None:
    shares = {
        name: [next(iter(run[policy]["served_share"].values())) for policy in ("fair", "fcfs")]
        for name, run in result["simulated"].items()
    }
    fair, fcfs = shares["both overloaded"]
    assert abs(fair - 0.5) < 0.03 < abs(fcfs - 0.5)
    fair, fcfs = shares["weights 1 and 3"]
    assert abs(fair - 0.25) < 0.03 < abs(fcfs - 0.25)
    assert result["machine"]["num_cores"] > 0
    engine = result["engine"]
    for name in ("flood", "both overloaded", "short beside long answers", "weights 1 and 3"):
        assert engine[name]["throughput_ratio"] > 0
        for policy in ("fair", "fcfs"):
            run = engine[name][policy]
            assert run["prompt_tokens"] > 0
            assert run["steps"] > 0
            assert max(run["served_by_weight"]) == 1.0
    assert engine["flood"]["alone"]["num_begun"][0] > 0
    assert engine["flood"]["ttft_p99_bound_ms"] > 0


def check_scheduling_step(result: Result) -> None:
    for row in result["places"].values():
        assert 0 < row["fair"]["schedule_us"] <= row["fair"]["all_us"]


def check_plain_cost(result: Result) -> None:
    assert result["against"] == "itself"
    assert set(result["loads"]) == {
        f"{name}, {kind}" for name in ("base", "plain LoRA") for kind in ("decode", "prefill")
    }
    for row in result["loads"].values():
        assert row["now_ms"] > 0 < row["before_ms"]
        assert len(row["rounds"]) == 3


def check_lookup_decoding(result: Result) -> None:
    for load in ("edit", "free"):
        assert result[load]["speedup"] > 0
        assert result[load]["tokens_per_step"] >= 1
        assert 0 <= result[load]["accepted"] <= 1


def check_cpu_decode(result: Result) -> None:
    forms = result["forms"]
    assert forms["none"]["over_bf16"] == 1.0
    assert forms["int4"]["floor_ms"] < forms["int8"]["floor_ms"] < forms["none"]["floor_ms"]
    assert all(each["cpu_ms"] >= each["recorded_ms"] for each in forms.values())
    if dispatch.USE_NUMBA:
        assert forms["int8"]["recorded_ms"] > 0


def check_start_time(result: Result) -> None:
    (times,) = result["starts"].values()
    assert times["ready_s"] > 0
    assert times["cpu_s"] > 0


def check_moe(result: Result) -> None:
    assert set(result["tokens_per_s_over_transformers"]) == {"one", "eight"}
    assert all(case["step_ms"]["clock"] > 0 for case in result["ours"].values())
    assert set(result["lora_step_over_plain"]) == {"one_experts", "eight_attention", "eight_experts"}


def check_merged_mode(result: Result) -> None:
    assert result["flapping"] == 0
    assert result["offline"]["ratio"] > 0
    assert result["served"]["ratio"] > 0
    assert result["folding"]["share"] > 0.9


def check_dashboard(result: Result) -> None:
    assert result["registered"] == 5
    assert 0 < result["late_s"]["mean"] <= result["late_s"]["max"]
    assert result["cost"]["watched_percent"] > 0


def check_cpu_peers(result: Result) -> None:
    assert result["absent"] == {
        "vllm_bf16": "no --vllm-python is named",
        "llama_f16": "no --llama-python is named",
    }
    assert result["failed"] == {}
    [ours] = result["sides"].values()
    assert set(ours["samples"].values()) == {1}
    assert min(ours["eight_tokens_per_s"], ours["eight_adapters_tokens_per_s"], ours["ttft_512_ms"]) > 0
    assert min(result["limits"].values()) > 0


def check_engine_kills(result: Result) -> None:
    assert result["lost"] == []
    assert result["requests"]["answered"] > 0
    assert len(result["recovery_s"]) == result["kills"] == 2


CHECKS: dict[str, Callable[[Result], None]] = {
    "cpu_peers": check_cpu_peers,
    "lookup_decoding": check_lookup_decoding,
    "plain_cost": check_plain_cost,
    "cpu_decode": check_cpu_decode,
    "start_time": check_start_time,
    "moe": check_moe,
    "merged_mode": check_merged_mode,
    "dashboard": check_dashboard,
    "fairness": check_fairness,
    "scheduling_step": check_scheduling_step,
    "engine_kills": check_engine_kills,
    "structured_output": check_structured_output,
    "prefix_cache": check_prefix_cache,
    "fuzz": check_fuzz,
    "soak": check_soak,
    "ipc": check_ipc,
    "cpu_lora": check_cpu_lora,
    "router_proxy": check_router_proxy,
    "prefix_routing": check_prefix_routing,
    "slo_classes": check_slo_classes,
}


RunToy = Callable[..., Result]


@pytest.fixture
def run_toy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[RunToy]:
    """Runs a script in benchmarks/, whose imports are those of a script there; what it sets for its whole
    process is as before afterwards."""
    cores, on_term, num_threads = os.sched_getaffinity(0), signal.getsignal(signal.SIGTERM), get_num_threads()
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def run(name: str, *more: str) -> Result:
        written = tmp_path / f"{name}.json"
        monkeypatch.setattr("sys.argv", [f"{name}.py", "--toy", *more, "--json", str(written)])
        assert not importlib.import_module(name).main()
        result: Result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert json.loads(written.read_text()) == result
        return result

    yield run
    os.sched_setaffinity(0, cores)
    signal.signal(signal.SIGTERM, on_term)
    set_num_threads(num_threads)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_toy_run_ends_in_one_json_line(name: str, run_toy: RunToy) -> None:
    result = run_toy(name, *TOY_ARGUMENTS.get(name, []))
    assert result["benchmark"] == name
    if (check := CHECKS.get(name)) is not None:
        check(result)


def test_a_router_killed_under_load_loses_no_request_that_it_answers_for(run_toy: RunToy) -> None:
    result = run_toy("soak", "--fleet", "--faults", "router killed")
    requests = result["requests"]
    ended = requests["answered"] + sum(requests["refused"].values()) + requests["left"] + requests["cut"]
    assert requests["sent"] == ended > 0
    assert len(result["recovery_s"]["router killed"]) == 1
    assert set(result["usage"]["after_phases"][0]["rss_by_part"]) == {"router"}


def test_a_script_runs_by_itself_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "cold_start_map.py"), "--toy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["benchmark"] == "cold_start_map"


def check_correctness(result: Result) -> None:
    assert all(aim["is_met"] for aim in result["aims"]), result["aims"]
    assert set(result["results"]["float32"]["modes"]) == {"cached", "on_demand", "pipelined"}


def check_decode_step(result: Result) -> None:
    assert set(result["step_ms"]) == set(result["floor_ms"]) == set(result["over_floor"])
    floors = [result["floor_of_adapters"][case] for case in result["adapters_add"]]
    assert 0 < floors[0] < floors[1]


def check_cold_start(result: Result) -> None:
    assert set(result["ttft_ms"]) == {"cached", "on_demand", "pipelined", "auto"}
    assert set(result["predictions"]) == set(result["ttft_ms"]["cached"]) == set(result["cached_drift"])
    assert result["emulated_link_gbps"] > 0


def check_workloads(result: Result) -> None:
    assert set(result["over_cached"]) == {"cached", "pipelined", "auto"}
    assert set(result["mean_ms"]["auto"]) == {"S3, published", "S3, capacity"}
    assert result["capacity_rps"]["S3"] > 0


GPU_CHECKS: dict[str, Callable[[Result], None]] = {
    "correctness": check_correctness,
    "decode_step": check_decode_step,
    "cold_start": check_cold_start,
    "workloads": check_workloads,
}


@pytest.fixture
def in_gpu_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports are those of a script there."""
    monkeypatch.syspath_prepend(str(GPU_BENCHMARKS))


@pytest.mark.usefixtures("in_gpu_folder")
@pytest.mark.parametrize("name", GPU_SCRIPTS)
def test_a_toy_run_on_the_cpu_ends_in_one_json_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(GPU_BENCHMARKS / f"{name}.py")
    monkeypatch.setattr("sys.argv", [script, "--toy", "--device", "cpu"])
    assert runpy.run_path(script)["main"]() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["benchmark"], result["device"]) == (name, "cpu")
    assert result["machine"]["num_cores"] > 0
    for aim in result["aims"]:
        relation, limit = aim["limit"].split()
        assert aim["is_met"] == (
            aim["value"] <= float(limit) if relation == "<=" else aim["value"] >= float(limit)
        )
    if (check := GPU_CHECKS.get(name)) is not None:
        check(result)


@needs_triton
@pytest.mark.usefixtures("in_gpu_folder")
def test_kernels_are_right_at_toy_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(GPU_BENCHMARKS / "kernel_speed.py")
    monkeypatch.setattr("sys.argv", [script, "--toy", "--device", DEVICE.type])
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", dispatch.TRITON_DEVICES)  # it sets them
    assert runpy.run_path(script)["main"]() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {f"lora {form}" for form in ("sgmv", "mbgmv", "bgmv")} <= set(result["errors"])
    assert all(0 < error < 0.01 for error in result["errors"].values())


def test_all_scripts_are_run_together_and_by_these_tests() -> None:
    lines = (GPU_BENCHMARKS / "all.sh").read_text().splitlines()
    run = {line.split()[1] for line in lines if line.startswith("run ")}
    assert run == {*GPU_SCRIPTS, "kernel_speed"}
    others = {"common", "compile_here", "compile_kernels", "host_steps", "stream_ops", "summary"}
    assert {path.stem for path in GPU_BENCHMARKS.glob("*.py")} == run | others


def test_a_bare_process_is_enough() -> None:
    """With torch, triton, numpy, safetensors and transformers, and what these bring along."""
    run = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({NOT_IN_A_BARE_PROCESS!r}));"
        f"sys.path.insert(0, {str(GPU_BENCHMARKS)!r}); folder = sys.path[0];"
        "scripts = {name: runpy.run_path(f'{folder}/{name}.py') for name in sys.argv[1:]};"
        "sys.argv = ['load.py', '--toy', '--device', 'cpu']; sys.exit(scripts['load']['main']())"
    )
    command = [sys.executable, "-c", run, *GPU_SCRIPTS, "summary"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["benchmark"] == "load"


def test_all_sh_goes_on_after_a_failure_and_tells_of_it(tmp_path: Path) -> None:
    """With an interpreter that fails, but for two scripts: one meets its aims, one misses one. A third one is
    stopped, with a part of its result told."""
    aims = {"load": [True, True], "prefill": [True, False]}
    for name, are_met in aims.items():
        found = [{"what": "x", "value": 2.0, "limit": "<= 1", "is_met": is_met} for is_met in are_met]
        (tmp_path / f"{name}.line").write_text(json.dumps({"benchmark": name, "aims": found}))
    stopped = json.dumps({"benchmark": "decode_step", "is_partial": True, "aims": [], "rounds": 2})
    fake = tmp_path / "python"
    real = f'PYTHONPATH="{ROOT}/src" exec "{sys.executable}" "$@"'
    fake.write_text(
        f'#!/bin/sh\ncase "$1" in\n*/load.py|*/prefill.py) cat "{tmp_path}/$(basename "$1" .py).line";;\n'
        f"*/summary.py) {real};;\n*/decode_step.py) echo '{stopped}'; echo more; exit 124;;\n"
        "*) echo gone wrong >&2; exit 3;;\nesac\n"
    )
    fake.chmod(0o755)
    command = [str(GPU_BENCHMARKS / "all.sh"), str(tmp_path / "out")]
    environment = {"PYTHON": str(fake), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "cold_start: status 3" in done.stdout
    assert "2 of 2 aims met" in done.stdout
    assert "1 of 2 aims met" in done.stdout
    assert "cold_start       FAILED" in done.stdout
    assert "decode_step      STOPPED" in done.stdout
    assert json.loads((tmp_path / "out" / "decode_step.json").read_text())["rounds"] == 2
    assert {p.stem for p in (tmp_path / "out").glob("*.json")} == {"load", "prefill", "decode_step"}
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert {"out/load.json", "out/cold_start.log", "out/summary.txt"} <= set(archive.getnames())
    assert "gone wrong" in (tmp_path / "out" / "cold_start.log").read_text()


def test_all_sh_that_is_stopped_packs_what_there_is(tmp_path: Path) -> None:
    """With an interpreter that tells a part of one script's result and then takes its time."""
    part = json.dumps({"benchmark": "load", "is_partial": True, "aims": [], "rounds": 2})
    fake, begun = tmp_path / "python", tmp_path / "begun"
    real = f'PYTHONPATH="{ROOT}/src" exec "{sys.executable}" "$@"'
    fake.write_text(
        f"#!/bin/sh\ncase \"$1\" in\n*/load.py) echo '{part}'; touch '{begun}'; exec sleep 600;;\n"
        f"*/summary.py) {real};;\n*/compile_here.py) ;;\n*) echo so >'{tmp_path}/others';;\nesac\n"
    )
    fake.chmod(0o755)
    environment = {"PYTHON": str(fake), "PATH": "/usr/bin:/bin"}
    command = [str(GPU_BENCHMARKS / "all.sh"), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as all_sh:
        wait_until(begun.exists)
        all_sh.terminate()
        said, _ = all_sh.communicate(timeout=60)
    assert all_sh.returncode == 143
    assert "load             STOPPED" in said
    assert not (tmp_path / "others").exists()
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert {"out/load.json", "out/summary.txt"} <= set(archive.getnames())


@needs_triton
def test_nothing_is_compiled_once_an_engine_is_ready_and_launches_are_bounded() -> None:
    """Of random steps and ranks; a step of decodes or of short prompts is one graph, with any adapters."""
    command = [sys.executable, str(GPU_BENCHMARKS / "host_steps.py"), "--toy", "--random-steps", "40"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["late"] == result["confused"] == []  # what is launched directly is what Triton would launch
    assert 20 < result["num_kinds"] < 60
    launches = {name: step["launches"] for name, step in result["steps"].items()}
    queued = launches.pop("a prompt of 2,048 with an adapter")
    assert queued <= 2 * 14  # two layers: five kernels of the base model, eight of adapters
    assert set(launches.values()) <= {0, 1}  # the sampler's


def test_two_real_engines_are_held_against_their_simulation(run_toy: RunToy) -> None:
    """What they attain is a matter of the machine; that all was played, promised and compared is not."""
    rows = run_toy("placement", "--studies", "engines")["engines"]
    by_kind = {row["what"]: row for row in rows}
    assert by_kind["calibration"]["slowness"] > 0
    plan = by_kind["plan"]
    assert plan["rate"] > 0
    assert plan["promised_unseen"] > 0.8
    assert plan["difference"] == pytest.approx(plan["found"] - plan["promised_unseen"])
    placed = [row for row in rows if row["what"] == "placement"]
    assert [row["placement"] for row in placed] == ["none", "adaptive"]
    for row in placed:
        assert all(0 <= row[clock] <= 1 for clock in ("engines", "stand-ins", "simulated"))
    assert by_kind["order"].keys() == {"what", "engines_as_simulated", "stand-ins_as_simulated"}


@pytest.mark.parametrize(
    ("found", "is_same"),
    [
        ({"none": 0.5, "adaptive": 0.9}, True),
        ({"none": 0.9, "adaptive": 0.5}, False),
        ({"none": 0.51, "adaptive": 0.5}, True),  # a tie
    ],
)
def test_placements_are_in_order_unless_a_clear_difference_turns(
    found: dict[str, float], is_same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    study = importlib.import_module("two_engines.study")
    assert study.is_same_order(found, {"none": 0.6, "adaptive": 0.95}) == is_same
