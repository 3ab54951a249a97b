"""What is remembered of a checkpoint is what the library gives, and spares the next start its imports."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.model.checkpoints import VARIANTS, build, save
from toppings.demo import demo_model_dir
from toppings.model import remembered as module
from toppings.model.config import ModelConfig
from toppings.model.remembered import remembered
from toppings.model.tokenizer import load_tokenizer

NO_TORCH = """
import sys
from pathlib import Path
import toppings.server.lifecycle
from toppings.config import Config
from toppings.engine.base import hold_state, model_path, open_registry
from toppings.text import TextModel
config = Config.from_settings({"model": "demo", "state_dir": sys.argv[1]}).engine
registry = open_registry(config, hold_state(config, "test"))
registry.register_directory(sys.argv[2])
print(registry.count(), TextModel.load(model_path(config)).encode("the sea")[0] >= 0, "torch" in sys.modules)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "toppings" / "remembered"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a.json").write_text("{}")
    return tmp_path


class Maker:
    def __init__(self, made: dict[str, Any] | None = None) -> None:
        self.made, self.num_calls = made or {"size": 1}, 0

    def __call__(self) -> dict[str, Any]:
        self.num_calls += 1
        return self.made


def test_what_was_made_is_not_made_again(path: Path) -> None:
    make = Maker()
    for _ in range(2):
        assert remembered("kind", path, ["a.json", "none.json"], make) == {"size": 1}
    assert make.num_calls == 1


def test_other_files_parts_kinds_or_versions_are_made_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Maker()
    remembered("kind", path, ["a.json"], make)
    remembered("kind", path, ["a.json"], make, "part")
    remembered("other", path, ["a.json"], make)
    (path / "a.json").write_text("[]")
    remembered("kind", path, ["a.json"], make)
    monkeypatch.setattr("toppings.model.remembered.metadata.version", lambda _: "9.9")
    remembered("kind", path, ["a.json"], make)
    assert make.num_calls == 5


def test_what_could_not_be_made_is_not_remembered(path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            remembered("kind", path, ["a.json"], fail)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0"])
def test_a_damaged_memory_is_made_anew(content: str, path: Path, cache: Path) -> None:
    make = Maker()
    remembered("kind", path, ["a.json"], make)
    next(cache.iterdir()).write_text(content)
    assert remembered("kind", path, ["a.json"], make) == {"size": 1}
    assert json.loads(next(cache.iterdir()).read_text()) == {"size": 1}


def test_a_disk_that_keeps_nothing_is_no_error(path: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("no directory")
    assert remembered("kind", path, ["a.json"], Maker()) == {"size": 1}


def test_the_newest_are_kept(path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEPT", 3)
    for part in "abcde":
        remembered("kind", path, [], Maker(), part)
        for age, file in enumerate(sorted(cache.iterdir(), key=lambda file: file.stat().st_mtime)):
            os.utime(file, (age, age))
    assert len(list(cache.iterdir())) == 3
    make = Maker()
    remembered("kind", path, [], make, "e")
    assert not make.num_calls


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_configuration_is_the_same_when_it_is_remembered(variant: str, tmp_path: Path) -> None:
    path = save(build(variant), tmp_path / "model")
    assert ModelConfig.from_checkpoint(path) == ModelConfig.from_checkpoint(path)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", None])
def test_a_tokeniser_is_the_one_that_the_library_chooses(name: str | None, tmp_path: Path) -> None:
    for file in demo_model_dir().glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = name
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    expected = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for _ in range(2):
        found = load_tokenizer(tmp_path)
        assert type(found) is type(expected)
        assert found.encode("Ahoy, the sea <s>") == expected.encode("Ahoy, the sea <s>")
        assert found.special_tokens_map == expected.special_tokens_map


def test_a_damaged_memory_of_a_tokeniser_is_not_believed(tmp_path: Path, cache: Path) -> None:
    load_tokenizer(demo_model_dir())
    for damage in ({}, {"module": "os", "name": "system"}):
        for file in cache.iterdir():
            file.write_text(json.dumps(damage))
        assert load_tokenizer(demo_model_dir()).encode("the sea")


def test_a_server_whose_model_is_known_imports_no_torch(tmp_path: Path) -> None:
    """It takes longer than all else that a start needs."""
    empty = tmp_path / "adapters"
    empty.mkdir()
    ModelConfig.from_checkpoint(demo_model_dir())
    load_tokenizer(demo_model_dir())
    command = [sys.executable, "-c", NO_TORCH, str(tmp_path / "state"), str(empty)]
    environment = {**os.environ, "TOPPINGS_TESTS_COLD": "1"}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert said.stdout.split() == ["0", "True", "False"]
