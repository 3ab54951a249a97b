import json
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.fixtures import SHAPES, write_adapter
from tests.adapters.test_checkpoint import header_file
from toppings.adapters.bounded_json import MAX_VALUES, parse_bounded
from toppings.adapters.checkpoint import AdapterError, read_checkpoint

MANY = MAX_VALUES + 1


@pytest.fixture(autouse=True)
def no_value_may_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text that has too many: parsing one holds the interpreter, which is what this is about."""
    loads = json.loads

    def checked(text: Any, **kwargs: Any) -> Any:
        assert len(text) < MAX_VALUES, "a text with too many values is parsed"
        return loads(text, **kwargs)

    monkeypatch.setattr(json, "loads", checked)


@pytest.mark.parametrize("text", ["[" + "0," * MANY + "0]", "[" * MANY, '{"a":' * MANY])
def test_a_text_with_too_many_values_is_refused_before_one_is_made(text: str) -> None:
    for each in (text, text.encode()):
        with pytest.raises(ValueError, match=f"at most {MAX_VALUES} are read"):
            parse_bounded(each)


def test_a_configuration_with_too_many_values_is_refused(tmp_path: Path) -> None:
    file = write_adapter(tmp_path) / "adapter_config.json"
    file.write_text(file.read_text()[:-1] + ', "auto_mapping": [' + "[]," * MANY + "[]]}")
    with pytest.raises(AdapterError, match=f"at most {MAX_VALUES} are read"):
        read_checkpoint(tmp_path, SHAPES)


def test_a_header_with_too_many_tensors_is_refused(tmp_path: Path) -> None:
    empty = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(empty % number for number in range(MANY // 6 + 1)) + "}"
    header_file(write_adapter(tmp_path), header.encode(), 0)
    with pytest.raises(AdapterError, match=f"at most {MAX_VALUES} are read"):
        read_checkpoint(tmp_path, SHAPES)


def test_text_files_with_too_many_values_are_not_used(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "own", "a": [' + "0," * MANY + "0]}")
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [' + "[]," * MANY + "[]]}")
    checkpoint = read_checkpoint(tmp_path, SHAPES)
    assert checkpoint.chat_template is None
    assert any("tokenizer_config.json" in warning for warning in checkpoint.warnings)
    assert any("added tokens of tokenizer.json" in warning for warning in checkpoint.warnings)
