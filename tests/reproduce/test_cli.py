"""`toppings reproduce`: every verb writes its figures, the data behind them, and the published values."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from toppings.reproduce.cli import reproduce_app


@pytest.mark.parametrize(
    ("verb", "names"), [("simulation", ("simulation-bgmv", "simulation-mbgmv")), ("testbed", ("testbed",))]
)
def test_a_quick_run_writes_figures_and_their_data(verb: str, names: tuple[str, ...], tmp_path: Path) -> None:
    arguments = [verb, "--quick", "--policies", "random,rank_aware", "--out", str(tmp_path)]
    result = CliRunner().invoke(reproduce_app, arguments)
    assert result.exit_code == 0, result.output
    for name in names:
        data = json.loads((tmp_path / f"{name}.json").read_text())
        assert "rank_aware" in json.dumps(data)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert "random" in (tmp_path / "comparison.md").read_text()


def test_rates_that_are_none_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(reproduce_app, ["simulation", "--rates", "fast", "--out", str(tmp_path)])
    assert isinstance(result.exception, ValueError)
    assert "'fast'" in str(result.exception)
