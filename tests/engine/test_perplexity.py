"""The perplexity that `toppings profile quantization` prints, against transformers."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.engine.oracle import reference_model
from tests.engine.test_quantization import dequantized
from toppings.cli.profile import app
from toppings.config import ConfigError, EngineConfig
from toppings.demo import demo_model_dir
from toppings.engine import perplexity

WINDOW = 40


def reference(model: Path, ids: list[int]) -> float:
    loss = 0.0
    for start in range(0, len(ids) - 1, WINDOW):
        window = torch.tensor(ids[start : start + WINDOW + 1])
        with torch.inference_mode():
            logits = reference_model(model, None)(window[None, :-1]).logits[0]
        loss += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(loss / (len(ids) - 1))


def test_perplexities_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "WINDOW", WINDOW)
    text, model = tmp_path / "text", demo_model_dir()
    text.write_text("The river runs past the mill, and the miller counts his sacks of flour. " * 8)
    options = ["--model", "demo", "--dtype", "float32", "--num-threads", "1", "--tokens", "100"]
    result = CliRunner().invoke(app, ["profile", "quantization", "--text", str(text), *options])
    assert result.exit_code == 0, result.output
    printed = {line.split()[0]: float(line.split()[1]) for line in result.output.splitlines()[-3:]}
    ids = perplexity._tokens(EngineConfig(model=str(model)), text, 100)
    expected = {"none": reference(model, ids)}
    for name in ("int8", "int4"):
        expected[name] = reference(dequantized(tmp_path / name, model, name), ids)
    assert printed == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_few_bits_cost_the_demo_little_on_a_text_that_it_was_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    text = tmp_path / "text"
    text.write_text(importlib.import_module("demo_corpus").held_out_text())
    config = EngineConfig(model=str(demo_model_dir()), num_threads=1)
    found = perplexity.measure_quantization(config, text, 1024)
    assert found["int8"] < 1.01 * found["none"]
    assert found["int4"] < 1.06 * found["none"]


def test_a_text_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the text"):
        perplexity._tokens(EngineConfig(model="demo"), tmp_path / "none", 9)
    (tmp_path / "empty").write_text("")
    with pytest.raises(ConfigError, match="at least 2"):
        perplexity._tokens(EngineConfig(model=str(demo_model_dir())), tmp_path / "empty", 9)
