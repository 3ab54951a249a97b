"""Pickled adapters: converted in a process of their own, and nothing in them runs."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.adapters.fixtures import SHAPES, make_tensors, write_adapter
from toppings.adapters.checkpoint import read_checkpoint
from toppings.adapters.errors import AdapterError
from toppings.adapters.pickled import convert_pickled
from toppings.cli.adapters import app


def pickled(path: Path, content: Any) -> Path:
    """An adapter whose weights are `content`, saved by torch."""
    write_adapter(path)
    (path / "adapter_model.safetensors").unlink()
    torch.save(content, path / "adapter_model.bin")
    return path


def test_a_converted_adapter_has_the_same_weights_and_files(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", make_tensors())
    (source / "chat_template.jinja").write_text("own")
    result = CliRunner().invoke(app, ["adapters", "convert", str(source), str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    converted, expected = read_checkpoint(tmp_path / "new", SHAPES), write_adapter(tmp_path / "expected")
    assert converted.chat_template == "own"
    for place, weights in read_checkpoint(expected, SHAPES).weights.items():
        assert torch.equal(converted.weights[place].a, weights.a)
        assert torch.equal(converted.weights[place].b, weights.b)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "new", "old"]


class Runs:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", {"a": Runs(tmp_path / "mark")})
    with pytest.raises(AdapterError, match=r"cannot convert .*old/adapter_model.bin"):
        convert_pickled(source, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old"]


def test_what_is_no_table_of_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="'a' is a int, not a tensor"):
        convert_pickled(pickled(tmp_path / "old", {"a": 3}), tmp_path / "new")


def test_a_file_that_would_grow_or_is_none_is_refused_unread(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", {})
    file = source / "adapter_model.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 1_000_000)
    with pytest.raises(AdapterError, match="compressed"):
        convert_pickled(source, tmp_path / "new")
    file.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(AdapterError, match=r"no file of torch\.save"):
        convert_pickled(source, tmp_path / "new")


def test_nothing_is_overwritten_and_what_is_missing_is_named(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", make_tensors())
    with pytest.raises(AdapterError, match="there already"):
        convert_pickled(source, source)
    with pytest.raises(AdapterError, match=r"none of adapter_model\.bin"):
        convert_pickled(write_adapter(tmp_path / "plain"), tmp_path / "new")
    (source / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        convert_pickled(source, tmp_path / "new")


def test_a_server_says_how_to_convert_it(tmp_path: Path) -> None:
    source = pickled(tmp_path / "old", make_tensors())
    assert json.loads((source / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with pytest.raises(AdapterError, match="toppings adapters convert"):
        read_checkpoint(source, SHAPES)
