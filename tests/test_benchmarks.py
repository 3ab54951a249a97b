"""Every benchmark runs at toy size and ends in one JSON line that names it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.timeout(420)
@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.stem)
def test_a_toy_run_ends_in_one_json_line(script: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(script), "--toy"], capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["benchmark"] == script.stem
