"""Folders where processes meet outlive none of their owners."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from toppings.engine.meeting_place import MeetingPlace


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Whose path is short, as a temporary directory's mostly is."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        monkeypatch.setattr(tempfile, "tempdir", path)
        yield Path(path)


def test_a_path_that_is_too_long_for_sockets_is_not_used(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    place = MeetingPlace.make("engine")
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(str(place.path / "engine"))
    assert not list(deep.iterdir())
    place.close()
    assert not place.path.exists()


def test_a_folder_is_ours_alone_and_gone_after_close() -> None:
    place = MeetingPlace.make("engine")
    assert place.path.stat().st_mode & 0o777 == 0o700
    place.close()
    place.close()
    assert not place.path.exists()


def test_what_a_killed_owner_left_is_removed_by_the_next(root: Path) -> None:
    code = (
        "import os; from toppings.engine.meeting_place import MeetingPlace as M;"
        "p = M.make('engine'); (p.path / 'engine').touch(); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "TMPDIR": str(root), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert len(list(root.iterdir())) == 1
    place = MeetingPlace.make("engine")
    assert list(root.iterdir()) == [place.path]
    place.close()


def test_folders_of_owners_that_live_and_of_others_stay(root: Path) -> None:
    alive = MeetingPlace.make("engine")
    (root / "toppings-meet-link").symlink_to(root / "elsewhere")
    (root / "elsewhere").mkdir(mode=0o700)
    (root / "toppings-meet-open").mkdir()
    (root / "toppings-meet-open").chmod(0o755)  # not as we make them
    MeetingPlace.make("engine").close()
    assert {path.name for path in root.iterdir()} == {
        alive.path.name,
        "toppings-meet-link",
        "toppings-meet-open",
        "elsewhere",
    }
    alive.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_nothing_can_be_locked_the_reason_is_told_and_nothing_left(
    code: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", fail) if code == errno.EMFILE else monkeypatch.setattr(
        fcntl, "flock", fail
    )
    with pytest.raises(OSError, match=os.strerror(code)):
        MeetingPlace.make("engine")
    monkeypatch.undo()
    assert not list(root.iterdir())


def test_a_folder_that_is_swept_before_it_is_locked_costs_no_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock, num_swept = fcntl.flock, 0

    def sweep_first(descriptor: int, how: int) -> None:
        nonlocal num_swept
        if num_swept < 3:
            num_swept += 1
            os.rmdir(os.readlink(f"/proc/self/fd/{descriptor}"))
        lock(descriptor, how)

    num_open = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", sweep_first)
    place = MeetingPlace.make("engine")
    assert (num_swept, len(os.listdir("/proc/self/fd"))) == (3, num_open + 1)
    place.close()
