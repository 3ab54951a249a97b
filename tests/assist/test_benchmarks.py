"""The benchmarks of this room still run and say what they measured."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_toy(name: str, tmp_path: Path) -> dict[str, Any]:
    """The JSON line that the benchmark ends with."""
    written = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", "--toy", "--json", str(written)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(written.read_text())
    return result


def test_ipc_times_every_way_to_every_number_of_receivers(tmp_path: Path) -> None:
    result = run_toy("ipc", tmp_path)
    assert len(result["us"]) == 2
    for row in result["us"].values():
        assert set(row) == {"shared memory", "UNIX socket", "TCP socket"}
        assert min(row.values()) > 0


def test_cpu_lora_times_workers_and_torch(tmp_path: Path) -> None:
    result = run_toy("cpu_lora", tmp_path)
    assert any(label.startswith("16 tokens") for label in result["times"])
    assert all(row["workers_ms"] > 0 and row["torch_ms"] > 0 for row in result["times"].values())
    assert result["peak_gflops"] > 0
