"""Every benchmark runs at toy size and ends in one JSON line that names it and holds what it measured."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
TOY_ARGUMENTS = {"routing": ["--rates", "20", "--kernels", "mbgmv"]}

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


def check_router_proxy(result: Result) -> None:
    for pattern in ("burst", "paced"):
        figures = result[pattern]
        assert 0 < figures["router_busy"] <= 1.1
        assert (figures["routed_pieces"] > 1) >= (pattern == "paced")  # passed on one by one


CHECKS: dict[str, Callable[[Result], None]] = {
    "ipc": check_ipc,
    "cpu_lora": check_cpu_lora,
    "router_proxy": check_router_proxy,
}


@pytest.mark.timeout(420)
@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.stem)
def test_a_toy_run_ends_in_one_json_line(script: Path, tmp_path: Path) -> None:
    written = tmp_path / "result.json"
    more = TOY_ARGUMENTS.get(script.stem, [])
    command = [sys.executable, str(script), "--toy", *more, "--json", str(written)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == script.stem
    assert json.loads(written.read_text()) == result
    if (check := CHECKS.get(script.stem)) is not None:
        check(result)
