"""The benchmarks of this room run, at toy size."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(name: str, *arguments: str) -> dict[str, object]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--toy", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=120)
    report: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return report


def test_routing_decision_benchmark_runs() -> None:
    assert run("routing_decision.py")["benchmark"] == "routing_decision"


def test_router_proxy_benchmark_runs() -> None:
    report = run("router_proxy.py")
    for pattern in ("burst", "paced"):
        figures = report[pattern]
        assert isinstance(figures, dict)
        assert 0 < figures["router_busy"] <= 1.1
        assert (figures["routed_pieces"] > 1) >= (pattern == "paced")  # passed on one by one


def test_routing_benchmark_runs() -> None:
    report = run("routing.py", "--rates", "20", "--kernels", "mbgmv")
    assert report["benchmark"] == "routing"
