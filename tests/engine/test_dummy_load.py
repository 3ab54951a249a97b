from pathlib import Path

import pytest

from tests.engine.driver import drive
from tests.engine.oracle import make_adapter, make_model, make_prompt
from toppings.config import EngineConfig
from toppings.engine.base import model_config


def test_dummy_weights_serve_a_checkpoint_that_has_none(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model, rank=8)
    for file in model.glob("*.safetensors*"):
        file.unlink()
    with drive(model, tmp_path / "state", {"a": adapter}, load_format="dummy") as driver:
        driver.add("base", make_prompt(0, 9), 5)
        driver.add("adapted", make_prompt(0, 9), 5, "a")
        tokens = driver.run()
    assert {len(ids) for ids in tokens.values()} == {5}


def test_a_known_name_needs_no_directory_when_weights_are_dummy() -> None:
    config = model_config(EngineConfig(model="llama-2-7b", load_format="dummy"))
    assert (config.num_layers, config.hidden_size) == (32, 4096)
    with pytest.raises(ValueError, match="cannot read"):
        model_config(EngineConfig(model="llama-2-7b"))
