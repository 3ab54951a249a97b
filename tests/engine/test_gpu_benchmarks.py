import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "decode_step.py"


def test_a_toy_run_on_the_cpu_ends_in_one_json_line() -> None:
    command = [sys.executable, str(SCRIPT), "--toy", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == "decode_step"
    assert result["ratio"] == result["step_ms"] / result["floor_ms"] > 0
