"""Log files that never stop who writes them: bounded in size, and a line that cannot be written is counted.

Several processes may append to one file: whoever finds it full moves it to `<name>.1`, and the others follow.
"""

import fcntl
import json
import logging
import os
import queue
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from typing import Protocol

from toppings.backlog import COMPLAIN_S, Backlog
from toppings.settings import OFF

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
MAX_QUEUED_LINES = 4096
LINGER_S = 1.0
"""How long the last lines may take to be written at the end."""
RECORDS_LINGER_S = 2.0
"""How long the last records of a `JsonLines` may."""


class RotatingFile:
    """Appends bytes. At `max_bytes` (0: no bound) the file becomes `<name>.1` and a new one begins."""

    def __init__(self, path: str | Path, max_bytes: int) -> None:
        self.path = Path(path)
        self.num_dropped = 0
        self._max_bytes = max_bytes
        self._descriptor: int | None = None
        self._complain_at = 0.0

    def append(self, data: bytes) -> None:
        """Writes whole lines, or drops and counts them; never raises. Of a line that was cut a part may stay,
        on a line of its own."""
        num_written = 0
        try:
            descriptor = self._open()
            while num_written < len(data):
                num_written += os.write(descriptor, data[num_written:])
        except OSError as error:
            self.num_dropped += data.count(b"\n", num_written)
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
            if self._ends_within_a_line(self._descriptor):
                os.write(self._descriptor, b"\n")
        return self._descriptor

    def _ends_within_a_line(self, descriptor: int) -> bool:
        """Where a write was cut, here or in a process that has ended."""
        if not os.fstat(descriptor).st_size:  # or it is no file
            return False
        try:
            with self.path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
        except OSError:  # not to be read
            return False

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
            StandardError().append(f"{self.path} cannot be written, lines are dropped: {error}\n".encode())


class JsonLines:
    """Records appended to a file, one a line, by a thread of its own: no disk holds up who writes.

    Writes nothing with an empty path or "off". A record that cannot be written, or comes while too many wait
    for a slow disk, is dropped and counted.
    """

    def __init__(self, path: str, max_bytes: int = 0) -> None:
        self._backlog: Backlog[Sequence[Mapping[str, object]]] | None = None
        self._file = RotatingFile(path, max_bytes)
        if path and path != OFF:
            self._backlog = Backlog(Path(path).name, self._append, MAX_QUEUED_LINES)
            self._backlog.put(())  # the file is there from the start

    @property
    def is_on(self) -> bool:
        return self._backlog is not None

    @property
    def num_dropped(self) -> int:
        return self._file.num_dropped + (0 if self._backlog is None else self._backlog.num_dropped)

    def write(self, *records: Mapping[str, object]) -> None:
        """Takes the records, which must not change any more. They wait as one: none is dropped for the
        others."""
        if self._backlog is not None and records:
            self._backlog.put(records, len(records))

    def close(self) -> None:
        """Returns when the last records are written, or within a few seconds."""
        if self._backlog is not None and self._backlog.close(RECORDS_LINGER_S):
            self._file.close()

    def _append(self, records: Sequence[Mapping[str, object]]) -> None:
        if not records:
            self._file.append(b"")
        for record in records:
            self._file.append(json.dumps(record).encode() + b"\n")


class StandardError:
    """Takes lines beside `sys.stderr`: a write to a pipe that nobody reads would hold that one's lock for
    ever, and the end of the process waits for it."""

    def append(self, data: bytes) -> None:
        """Never raises: where standard error itself fails there is nobody to tell."""
        with suppress(OSError, ValueError):  # closed, or no file
            descriptor = -1 if sys.stderr is None else sys.stderr.fileno()
            while data:
                data = data[os.write(descriptor, data) :]

    def close(self) -> None:
        """It stays open."""


class LineFile(Protocol):
    def append(self, data: bytes) -> None: ...
    def close(self) -> None: ...


class _Writer(QueueListener):
    """A thread that appends records, which are formatted, to a file. It has no `logging.Handler` for that:
    the end of the process would wait for the lock of one that hangs."""

    def __init__(self, records: "queue.Queue[logging.LogRecord]", file: LineFile) -> None:
        super().__init__(records)
        self._file = file

    def handle(self, record: logging.LogRecord) -> None:
        self._file.append(f"{record.getMessage()}\n".encode(errors="backslashreplace"))


class QueuedHandler(QueueHandler):
    """Formats a record and leaves it to a thread that appends it to `file`: a disk that hangs, or a pipe that
    nobody reads, holds up nobody who logs, and no end of the process.

    What comes while too many wait is dropped and counted, and told to `other`, once a minute.
    """

    queue: "queue.Queue[logging.LogRecord]"

    def __init__(self, file: LineFile, name: str) -> None:
        super().__init__(queue.Queue(MAX_QUEUED_LINES))
        self.other: QueuedHandler | None = None
        self.num_dropped = 0
        self._what = name
        self._complain_at = 0.0
        self._file = file
        self._listener: QueueListener | None = _Writer(self.queue, file)
        self._listener.start()

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.num_dropped += 1
            self._complain()

    def handleError(self, record: logging.LogRecord) -> None:
        """A record that cannot be formatted is its author's fault."""

    def close(self) -> None:
        """Returns when the last lines are written, or within `LINGER_S`."""
        ends_at = time.monotonic() + LINGER_S
        while self.queue.unfinished_tasks and time.monotonic() < ends_at:
            time.sleep(0.005)
        if self._listener is not None and not self.queue.unfinished_tasks:
            self._listener.stop()
            self._listener = None
            self._file.close()
        super().close()

    def _complain(self) -> None:
        if self.other is None or time.monotonic() < self._complain_at:
            return
        self._complain_at = time.monotonic() + COMPLAIN_S
        told = f"{self._what} takes no lines, {self.num_dropped} are dropped so far"
        record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, told, None, None)
        self.other.enqueue(self.other.prepare(record))  # without its lock: it may be telling us the same


def log_handlers(path: str, max_bytes: int) -> list[logging.Handler]:
    """To standard error, and to the file `path` where one is named; each written by a thread of its own."""
    told = QueuedHandler(StandardError(), "standard error")
    if not path:
        return [told]
    kept = QueuedHandler(RotatingFile(path, max_bytes), path)
    told.other, kept.other = kept, told
    return [told, kept]
