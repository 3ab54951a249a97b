"""What `--model` means; the real model itself is asked once."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from toppings import LLM, SamplingParams
from toppings.config import EngineConfig
from toppings.core import FinishReason
from toppings.demo import demo_adapters_dir, demo_model_dir
from toppings.engine.base import base_names, served_model_name, state_dir
from toppings.model.gguf import GgufError
from toppings.model.gguf_header import MAGIC, header_bytes
from toppings.sources import models
from toppings.sources.models import find_model, with_model


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """What was converted; each becomes the demo's checkpoint."""
    done: list[Path] = []

    def convert(file: Path, directory: Path) -> None:
        done.append(file)
        shutil.copytree(demo_model_dir(), directory)

    monkeypatch.setattr(models, "convert_gguf", convert)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return done


def make_gguf(path: Path, content: bytes = b"weights") -> Path:
    path.write_bytes(MAGIC + content)
    return path


def test_without_a_name_it_is_the_installed_model_else_the_demo(
    conversions: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "packaged_gguf", lambda: None)
    assert find_model() == find_model("demo")
    assert find_model().adapters == demo_adapters_dir()
    assert conversions == []
    packaged = make_gguf(tmp_path / "Smol.Q4_1.gguf")
    monkeypatch.setattr(models, "packaged_gguf", lambda: packaged)
    monkeypatch.setattr(models, "real_adapters_dir", lambda: tmp_path)
    found = find_model()
    assert (found.name, found.adapters) == (models.REAL_NAME, tmp_path)
    assert find_model(str(found.path)) == found  # as those see it who get the directory
    assert find_model().path == found.path
    assert conversions == [packaged]
    config = with_model(EngineConfig())
    assert (config.model, config.served_model_name) == (str(found.path), models.REAL_NAME)
    assert state_dir(config) == state_dir(EngineConfig())
    assert state_dir(config).name.startswith(f"{models.REAL_NAME}-")


def test_the_demo_goes_by_its_name_however_it_is_named(tmp_path: Path) -> None:
    for model in ("demo", str(demo_model_dir())):
        config = with_model(EngineConfig(model=model))
        assert served_model_name(config) == served_model_name(EngineConfig(model=model)) == "toppings-demo"
        assert "toppings-demo" in base_names(config)
        assert state_dir(config).name.startswith("toppings-demo-")


def test_a_file_is_converted_once_and_again_when_it_has_changed(
    conversions: list[Path], tmp_path: Path
) -> None:
    file = make_gguf(tmp_path / "tiny-Q8_0.gguf")
    first, again = find_model(str(file)), find_model(str(file))
    assert (first, first.name) == (again, "tiny-Q8_0")
    assert first.path.is_relative_to(tmp_path / "cache")
    make_gguf(file, b"weightS")
    assert find_model(str(file)).path != first.path
    assert conversions == [file, file]


def test_a_state_directory_that_is_named_keeps_what_is_made_unless_the_cache_has_it(
    conversions: list[Path], tmp_path: Path
) -> None:
    file, state = make_gguf(tmp_path / "one.gguf"), tmp_path / "state"
    made = find_model(str(file), str(state))
    assert made.path.is_relative_to(state)
    cached = find_model(str(file))
    assert cached.path.is_relative_to(tmp_path / "cache")
    assert find_model(str(file), str(tmp_path / "other")).path == cached.path
    assert len(conversions) == 2


def test_what_is_no_model_file_is_said_at_once(conversions: list[Path], tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not one")
    for name, problem in (("x.gguf", "is no GGUF file"), ("missing.gguf", "No such file")):
        with pytest.raises(GgufError, match=problem):
            find_model(str(tmp_path / name))
    assert conversions == []


def test_a_change_anywhere_in_a_files_header_is_another_model(tmp_path: Path) -> None:
    """Beyond what is read of every file: a vocabulary, and then a value."""
    file = tmp_path / "m.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_token_list([f"token {i} {'x' * 200}" for i in range(30000)])
    writer.add_array("nested", [[1, 2], [3, 4]])
    writer.add_eos_token_id(1_234_567)
    writer.add_tensor("w", np.ones((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = file.read_bytes()
    place = content.index((1_234_567).to_bytes(4, "little"))
    assert models.HEAD_BYTES < place < header_bytes(file) <= len(content) - 64 * 64 * 4
    first = models.file_identity(file)
    file.write_bytes(content[:place] + (7_654_321).to_bytes(4, "little") + content[place + 4 :])
    assert models.file_identity(file) != first


@pytest.mark.parametrize("content", [b"", MAGIC, MAGIC + b"\xff" * 100], ids=["empty", "cut", "endless"])
def test_a_header_without_end_is_followed_no_further_than_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    assert header_bytes(tmp_path / "m.gguf") <= max(len(content), 8)


def test_the_installed_model_answers_and_stops(tmp_path: Path) -> None:
    with LLM(state_dir=str(tmp_path), kv_cache_bytes="64MiB", num_threads=1, dtype="float32") as llm:
        prompt = llm.text_model.chat(
            [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
        )
        [answer] = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=20))
    assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", FinishReason.STOP)
