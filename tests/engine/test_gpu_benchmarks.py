import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "decode_step.py"


def test_a_toy_run_on_the_cpu_ends_in_one_json_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--toy", "--device", "cpu"])
    assert runpy.run_path(str(SCRIPT))["main"]() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == "decode_step"
    assert result["ratio"] == result["step_ms"] / result["floor_ms"] > 0
