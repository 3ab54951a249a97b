import logging
from pathlib import Path

import pytest

from toppings.access import KEY_VARIABLE, read_api_key, with_api_key
from toppings.config import Config, ConfigError
from toppings.server.lifecycle import with_run_files


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text("  of-the-file\n")
    return path


def test_a_key_comes_from_the_option_else_the_file_else_the_variable(
    key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "of-the-variable")
    assert read_api_key("of-the-option", key_file) == "of-the-option"
    assert read_api_key("", key_file) == "of-the-file"
    assert read_api_key() == "of-the-variable"
    monkeypatch.delenv(KEY_VARIABLE)
    assert read_api_key() == ""


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", b"\xff\xfe", b"a\x00b"])
def test_a_file_without_a_usable_key_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="key") as caught:
        read_api_key("", path)
    assert "words" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-key"):
        read_api_key("", tmp_path / "no-such-key")


@pytest.mark.parametrize(("mode", "warnings"), [(0o600, 0), (0o640, 1), (0o604, 1)])
def test_a_file_that_others_can_read_is_warned_of(
    key_file: Path, mode: int, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    key_file.chmod(mode)
    with caplog.at_level(logging.WARNING):
        read_api_key("", key_file)
    assert len(caplog.records) == warnings
    assert "of-the-file" not in caplog.text


def test_the_servers_key_is_read_at_start_and_written_nowhere(key_file: Path, tmp_path: Path) -> None:
    config = Config.from_settings(
        {"model": "demo", "api_key_file": str(key_file), "log_dir": str(tmp_path / "logs")}
    )
    running = with_api_key(with_run_files(config))
    assert running.server.api_key == "of-the-file"
    assert "of-the-file" not in repr(running)
    with_run_files(running)
    assert all("of-the-file" not in path.read_text() for path in tmp_path.rglob("*.yaml"))
