from pathlib import Path

import pytest
from typer.testing import CliRunner

from toppings.command import app
from toppings.tenants.book import TenantBook


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.yaml"
    path.write_text("tenants:\n  search: {use: ['*']}\n")
    return path


def run(path: Path, *words: str) -> str:
    result = CliRunner().invoke(app, ["keys", *words, "--tenants-file", str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_a_key_is_made_shown_once_listed_and_revoked(path: Path) -> None:
    key = run(path, "add", "search").strip()
    key_id = key.split("-")[1]
    header = f"Bearer {key}".encode()
    assert TenantBook(str(path)).identify(header, b"").name == "search"
    listed = run(path, "list")
    assert key_id in listed
    assert "search" in listed
    assert key.split("-", 2)[2] not in listed
    assert run(path, "revoke", key_id) == f"revoked key {key_id} of tenant search\n"
    assert key_id not in run(path, "list")


def test_what_is_wrong_is_told(path: Path) -> None:
    with pytest.raises(ValueError, match="no tenant 'serch'; there are: search"):
        run(path, "add", "serch")
    with pytest.raises(ValueError, match="cannot read tenants_file"):
        run(path.with_name("nowhere"), "list")
