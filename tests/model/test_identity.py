"""Which base model a checkpoint is."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch

from toppings.config import EngineConfig
from toppings.engine.base import base_identity, state_dir
from toppings.model.identity import checkpoint_identity
from toppings.synth import PRESETS, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "base"
    write_model(path, PRESETS["tiny"], seed=0)
    return path


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "base"))


def test_a_copy_is_the_same_model(model: Path, copy: Path) -> None:
    assert checkpoint_identity(copy) == checkpoint_identity(model)


def test_an_adapter_merged_into_one_projection_makes_another_model(model: Path, copy: Path) -> None:
    [file] = copy.glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] += 0.01
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    assert checkpoint_identity(copy) != checkpoint_identity(model)


def test_another_configuration_makes_another_model(model: Path, copy: Path) -> None:
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps"', '"rms_norm_eps" '))
    assert checkpoint_identity(copy) != checkpoint_identity(model)


def test_a_damaged_file_has_an_identity(copy: Path) -> None:
    [file] = copy.glob("*.safetensors")
    for content in (b"", b"\xff" * 100, (20).to_bytes(8, "little") + b'{"a": {"data_offsets'):
        file.write_bytes(content)
        assert checkpoint_identity(copy)


def test_models_of_one_name_have_default_directories_of_their_own(
    model: Path, copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    configs = [
        EngineConfig(model=str(model)),
        EngineConfig(model=str(copy)),
        EngineConfig(model=str(model), dtype="float16"),
        EngineConfig(model=str(model), load_format="dummy"),
        EngineConfig(model=str(model), load_format="dummy", seed=1),
    ]
    directories = [state_dir(config) for config in configs]
    assert len(set(directories)) == len(directories)
    assert all(each.parent == tmp_path / "cache" / "toppings" for each in directories)
    assert all(each.name.startswith("base-") for each in directories)


def test_known_names_have_an_identity_without_a_checkpoint() -> None:
    identities = {
        base_identity(EngineConfig(model=name, load_format="dummy")) for name in ("llama-2-7b", "llama-2-13b")
    }
    assert len(identities) == 2
