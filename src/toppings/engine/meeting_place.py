"""Folders in the temporary directory where the processes of one owner meet, by sockets or by a state
directory of their own, and which outlive none of their owners."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "toppings-meet-"
_MAX_ROOT_BYTES = 60
"""Of the temporary directory's path: with names below it, a socket's has 107 bytes at most."""


class MeetingPlace:
    """A folder that only this user may enter, locked as long as its owner lives and removed by `close`.

    What owners that were killed have left is removed when the next one is made: it is ours and not locked.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock

    @classmethod
    def make(cls, kind: str) -> "MeetingPlace":
        """Raises OSError where the temporary directory takes no folder, or none that can be locked."""
        root = _root()
        _sweep(root)
        while True:
            path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{kind}-", dir=root))
            try:
                lock = _try_lock(path)
            except OSError:
                with suppress(OSError):
                    path.rmdir()
                raise
            if lock is None:
                continue  # somebody sweeps it
            if path.exists():  # nobody has swept it before it was locked
                return cls(path, lock)
            os.close(lock)

    def close(self) -> None:
        """To be called as soon as nobody needs it, or not at all."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _root() -> Path:
    """The temporary directory, or /tmp where its path is too long for sockets in it."""
    root = tempfile.gettempdir()
    return Path(root if len(os.fsencode(root)) <= _MAX_ROOT_BYTES else "/tmp")


def _sweep(root: Path) -> None:
    for path in root.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if _is_ours(path) and (lock := _try_lock(path)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _is_ours(path: Path) -> bool:
    """A folder (no link to one) that this user has made here."""
    with suppress(OSError):
        status = path.lstat()
        return status.st_uid == os.getuid() and status.st_mode & 0o170777 == 0o040700
    return False


def _try_lock(path: Path) -> int | None:
    """None where somebody else holds it, or has removed it. Raises OSError where nobody can hold it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise OSError(error.errno, error.strerror, str(path)) from error
    return descriptor
