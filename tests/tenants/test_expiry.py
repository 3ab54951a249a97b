"""Keys that expire: how that is written, who is told beforehand, and what they open then."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from toppings.command import app
from toppings.config import ConfigError
from toppings.tenants.book import TenantBook
from toppings.tenants.expiry import DAY_S, read_expiry
from toppings.tenants.file import parse
from toppings.tenants.keys import add_key
from toppings.tenants.refusals import Refusal

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.yaml"
    path.write_text("tenants:\n  search: {use: ['*']}\n  ops: {admin: on}\n")
    return path


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("12h", "2026-02-01T00:00:00Z"),
        (" 90d ", "2026-05-01T12:00:00Z"),
        ("2w", "2026-02-14T12:00:00Z"),
        ("2026-02-01", "2026-02-01T00:00:00Z"),
        ("2026-02-01T00:30:00+02:00", "2026-01-31T22:30:00Z"),
        ("2026-02-01T00:30:00Z", "2026-02-01T00:30:00Z"),
    ],
)
def test_what_a_text_means(text: str, until: str) -> None:
    assert read_expiry(text, NOW) == until


@pytest.mark.parametrize(
    "text",
    [
        "soon",
        "90",
        "3m",
        "-1d",
        "0d",
        "1.5d",
        "9999999999d",
        "999999999w",
        "2026-01-31",
        "2020-01-01",
        "d",
        "\0",
    ],
)
def test_another_text_is_refused_with_what_would_be_right(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"expires is .*write a time from now on in hours, days or weeks, as 12h, 90d"
    ):
        read_expiry(text, NOW)


def test_a_key_opens_until_it_expires(path: Path) -> None:
    short, long, forever = (add_key(path, "search", expires) for expires in ("1h", "2h", ""))
    end = datetime.fromisoformat(short.entry.expires)
    clock = Clock(end.timestamp() - 1)
    book = TenantBook(str(path), "the-one", wall_clock=clock)
    for key in (short, long, forever):
        assert book.identify(bearer(key.text), b"").name == "search"
    clock.now += 1
    for given in ((bearer(short.text), b""), (b"", short.text.encode())):
        with pytest.raises(Refusal) as refused:
            book.identify(*given)
        assert refused.value.status == 401
        assert f"{short.entry.id} expired at {short.entry.expires}" in str(refused.value)
        assert short.text not in str(refused.value)
        assert refused.value.headers == {"WWW-Authenticate": "Bearer"}
    for key in (long, forever):
        assert book.identify(bearer(key.text), b"").name == "search"
    assert book.identify(bearer("the-one"), b"").tenant.is_admin
    # An administrator gives it more time: the file is read anew.
    path.write_text(path.read_text().replace(short.entry.expires, "2999-01-01T00:00:00Z"))
    assert book.reload()
    assert book.identify(bearer(short.text), b"").name == "search"


def test_the_administrators_key_never_expires(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not even where the file has it, too."""
    key = add_key(path, "search", "1h")
    clock = Clock(datetime(2999, 1, 1, tzinfo=UTC).timestamp())
    book = TenantBook(str(path), key.text, wall_clock=clock)
    assert book.identify(bearer(key.text), b"").tenant.is_admin
    assert book.key_of(bearer(key.text), b"") is None
    assert f"key {key.entry.id} of tenant search is the api_key" in caplog.text
    caplog.clear()
    book.warn_of_endings()
    assert not caplog.records


def test_the_log_warns_of_each_key_once_a_week_a_day_before_and_at_its_end(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, other = add_key(path, "search", "2999-01-01"), add_key(path, "ops", "2999-01-02")
    add_key(path, "ops")
    clock = Clock(datetime(2999, 1, 1, tzinfo=UTC).timestamp() - 8 * DAY_S)
    book = TenantBook(str(path), wall_clock=clock)

    def told(after_days: float) -> list[str]:
        clock.now += after_days * DAY_S
        caplog.clear()
        for _ in range(3):
            book.warn_of_endings()
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    name = f"key {key.entry.id} of tenant search"
    assert told(0) == []
    assert told(1) == [f"{name} expires in 7.0 days (2999-01-01T00:00:00Z)"]
    assert told(0.5) == []
    [later] = told(1)
    assert later.startswith(f"key {other.entry.id} of tenant ops expires in 6.5 days")
    assert told(5) == [f"{name} expires in 12h0m0s (2999-01-01T00:00:00Z)"]
    assert len(told(0.5)) == 2  # one has expired, the other has a day
    assert told(0) == []
    path.write_text(path.read_text().replace("2999-01-01", "2999-01-05"))
    assert book.reload()
    [again] = told(0)
    assert again.startswith(f"{name} expires in 4.0 days")


@pytest.mark.parametrize("expires", ["soon", "90d", "2026-13-01"])
def test_a_file_with_another_text_is_refused(path: Path, expires: str) -> None:
    entry = {"id": "x", "tenant": "ops", "sha256": 64 * "a", "expires": expires}
    with pytest.raises(ConfigError, match=f"key x: expires is '{expires}'; it must be an instant"):
        parse(f"{path.read_text()}keys:\n- {json.dumps(entry)}\n", "x")


def test_the_command_makes_such_keys_and_lists_them(path: Path) -> None:
    def run(*words: str) -> str:
        words = ("keys", *words, "--tenants-file", str(path))
        result = CliRunner().invoke(app, words, catch_exceptions=False, env={"COLUMNS": "200"})
        assert result.exit_code == 0
        return result.output

    said = run("add", "search", "--expires", "90d")
    [entry] = parse(path.read_text(), "x").keys
    assert f"which expires at {entry.expires}" in said
    run("add", "search")
    over = {"id": "old", "tenant": "ops", "sha256": 64 * "a", "expires": "2020-01-01T00:00:00Z"}
    path.write_text(f"{path.read_text()}- {json.dumps(over)}\n")
    rows = {line.split()[1]: line for line in run("list").splitlines() if "search" in line or "ops" in line}
    assert entry.expires in rows[entry.id]
    assert "2020-01-01T00:00:00Z (expired)" in rows["old"]
    assert sum("never" in row for row in rows.values()) == 1
    with pytest.raises(ConfigError, match="expires is 'never'"):
        CliRunner().invoke(
            app,
            ["keys", "add", "ops", "--expires", "never", "--tenants-file", str(path)],
            catch_exceptions=False,
        )
