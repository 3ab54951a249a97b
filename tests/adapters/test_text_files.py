import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.fixtures import SHAPES, open_registry, write_adapter
from toppings.adapters.checkpoint import AdapterError, read_checkpoint
from toppings.adapters.peft_config import CONFIG_FILE
from toppings.adapters.stored_tensors import WEIGHTS_FILE
from toppings.adapters.text_files import (
    MAX_TEMPLATE_BYTES,
    MAX_TOKENS,
    TEMPLATE_FILE,
    TEXT_FILES,
    TextFiles,
)


def write_config(path: Path, **fields: Any) -> Path:
    (path / "tokenizer_config.json").write_text(json.dumps(fields))
    return path


def write_tokens(path: Path, tokens: dict[str, int]) -> Path:
    added = [{"id": i, "content": token, "special": True} for token, i in tokens.items()]
    (path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": {}}))
    return path


@pytest.mark.parametrize(
    "value", ["own", [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "own"}]]
)
def test_a_template_may_stand_in_the_tokenisers_configuration(tmp_path: Path, value: Any) -> None:
    write_config(write_adapter(tmp_path), chat_template=value)
    assert read_checkpoint(tmp_path, SHAPES).chat_template == "own"


def test_a_templates_own_file_comes_first(tmp_path: Path) -> None:
    (write_config(tmp_path, chat_template="other") / "chat_template.jinja").write_text("own")
    assert TextFiles.read(tmp_path).chat_template == "own"


def test_an_adapter_without_template_has_none(tmp_path: Path) -> None:
    assert TextFiles.read(write_config(tmp_path, model_max_length=8)).chat_template is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", b"a" * (MAX_TEMPLATE_BYTES + 1)),
        ("chat_template.jinja", b"\xff\xfe"),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b'{"a": ' * 100_000),
        ("tokenizer_config.json", b'{"chat_template": 3}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "tool_use", "template": 1}, 2]}'),
    ],
)
def test_what_cannot_be_used_is_told_by_name_or_is_no_template(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (write_adapter(tmp_path) / name).write_bytes(content)
    checkpoint = read_checkpoint(tmp_path, SHAPES)
    assert checkpoint.chat_template is None
    assert any(name in warning for warning in checkpoint.warnings) or b"tool_use" in content


def test_a_gigantic_file_is_not_read(tmp_path: Path) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 40)
    text = TextFiles.read(tmp_path)
    assert text.chat_template is None
    assert len(text.warnings) == 2


@pytest.mark.parametrize("name", [*TEXT_FILES, CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("kind", ["fifo", "directory", "kernel", "out of the roots"])
def test_a_file_that_is_none_of_the_adapters_own_is_refused_by_name_at_once(
    tmp_path: Path, name: str, kind: str
) -> None:
    file = write_adapter(tmp_path / "roots" / "a") / name
    file.unlink(missing_ok=True)
    (tmp_path / "secret").write_text("{}")
    places = {"kernel": "/proc/self/environ", "out of the roots": str(tmp_path / "secret")}
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to(places[kind])
    with pytest.raises(AdapterError, match=name):
        read_checkpoint(file.parent, SHAPES, roots=[tmp_path / "roots"])
    if kind == "kernel":
        with pytest.raises(AdapterError, match=name):
            read_checkpoint(file.parent, SHAPES)


def test_links_within_the_roots_are_followed(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "roots" / "a")
    (tmp_path / "roots" / "common.jinja").write_text("own")
    (path / TEMPLATE_FILE).symlink_to("../common.jinja")
    (tmp_path / "link").symlink_to("roots")
    assert read_checkpoint(path, SHAPES, roots=[tmp_path / "link"]).chat_template == "own"


def test_added_tokens_are_those_of_both_files(tmp_path: Path) -> None:
    write_tokens(tmp_path, {"<a>": 7, "<b>": 8})
    write_config(
        tmp_path, added_tokens_decoder={"7": {"content": "<a>"}, "9": {"content": "x", "lstrip": True}}
    )
    text = TextFiles.read(tmp_path)
    assert [(each.content, each.id, each.special) for each in text.added_tokens.values()] == [
        ("<a>", 7, True),
        ("x", 9, False),
        ("<b>", 8, True),
    ]
    assert text.added_tokens["x"].lstrip
    assert text.warnings == ()


def test_malformed_tokens_have_no_id(tmp_path: Path) -> None:
    write_config(
        tmp_path, added_tokens_decoder={"9" * 5000: {"content": "<x>"}, "1": None, "2": {"content": 3}}
    )
    assert {name: each.id for name, each in TextFiles.read(tmp_path).added_tokens.items()} == {"<x>": -1}


@pytest.mark.parametrize(
    "listed",
    [
        '[{"id": 1, "content": "<a',
        '[{"id": 1, "content": ' + '"]' + '\\"' * 1_500_000,
        "[" * 1_000_000,
        "[1 2]",
    ],
)
def test_a_list_of_added_tokens_that_cannot_be_read_is_told(tmp_path: Path, listed: str) -> None:
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": ' + listed)
    text = TextFiles.read(tmp_path)
    assert text.added_tokens == {}
    assert "tokenizer.json cannot be read" in text.warnings[0]


def test_too_many_tokens_are_told(tmp_path: Path) -> None:
    write_tokens(tmp_path, {f"<{i}>": i for i in range(MAX_TOKENS + 1)})
    text = TextFiles.read(tmp_path)
    assert text.added_tokens == {}
    assert f"{MAX_TOKENS + 1} tokens" in text.warnings[0]


def test_a_new_template_is_a_changed_adapter(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "all" / "a")
    registry = open_registry(tmp_path / "state")
    registry.register_directory(tmp_path / "all")
    (path / "chat_template.jinja").write_text("own")
    [record] = registry.register_directory(tmp_path / "all").registered
    with registry.open_packed(record.adapter_id) as packed:
        assert packed.header.chat_template == "own"
    registry.close()
