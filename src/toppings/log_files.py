"""Log files that never stop who writes them: bounded in size, and a line that cannot be written is counted.

Several processes may append to one file: whoever finds it full moves it to `<name>.1`, and the others follow.
"""

import fcntl
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
COMPLAIN_S = 60.0
"""How often standard error is told that lines are being dropped."""


class RotatingFile:
    """Appends bytes. At `max_bytes` (0: no bound) the file becomes `<name>.1` and a new one begins."""

    def __init__(self, path: str | Path, max_bytes: int) -> None:
        self.path = Path(path)
        self.num_dropped = 0
        self._max_bytes = max_bytes
        self._descriptor: int | None = None
        self._complain_at = 0.0

    def append(self, data: bytes) -> None:
        """Writes whole lines, or drops and counts them; never raises."""
        try:
            descriptor = self._open()
            written = os.write(descriptor, data)
            if written < len(data):
                os.write(descriptor, data[written:])
        except OSError as error:
            self.num_dropped += data.count(b"\n")
            self.close()
            self._complain(error)

    def close(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = None

    def _open(self) -> int:
        """The file of that name as it is now, with room in it."""
        if self._descriptor is not None:
            if not self._is_current(self._descriptor):
                self.close()
            elif self._max_bytes and os.fstat(self._descriptor).st_size >= self._max_bytes:
                self._rotate(self._descriptor)
                self.close()
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(
                self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
        return self._descriptor

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def _rotate(self, descriptor: int) -> None:
        """Under a lock: of two that find the file full, the second must not move the new one."""
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if self._is_current(descriptor) and self.path.is_file():
            os.replace(self.path, self.path.with_name(self.path.name + ".1"))

    def _complain(self, error: OSError) -> None:
        if time.monotonic() >= self._complain_at:
            self._complain_at = time.monotonic() + COMPLAIN_S
            with suppress(OSError, ValueError):
                print(f"{self.path} cannot be written, lines are dropped: {error}", file=sys.stderr)


class LogFileHandler(logging.Handler):
    def __init__(self, path: str, max_bytes: int) -> None:
        super().__init__()
        self.file = RotatingFile(path, max_bytes)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):  # a record that cannot be formatted is its author's fault
            line = self.format(record) + "\n"
            self.file.append(line.encode(errors="backslashreplace"))

    def close(self) -> None:
        self.file.close()
        super().close()


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    def handleError(self, record: logging.LogRecord) -> None:
        """Where standard error itself fails there is nobody to tell."""


def log_handlers(path: str, max_bytes: int) -> list[logging.Handler]:
    """To standard error, and to the file `path` where one is named."""
    handlers: list[logging.Handler] = [_StderrHandler()]
    if path:
        handlers.append(LogFileHandler(path, max_bytes))
    return handlers
