"""The registry's SQLite file: who writes waits for the lock a bounded time, who reads never does."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from toppings.adapters.errors import StateError, StateFullError

LOCK_WAIT_S = 2.0
"""How long a write waits for another process that holds the file's lock."""
LOCKED_WAIT_S, LOCKED_MEMORY_S = 0.05, 1.0
"""Once one has waited in vain, those of the next second wait only so long: a queue of writes ends soon."""
TURN_WAIT_S = 10.0
"""How long a write waits for those of this process that came before."""
VERSION = 6
_ADVICE = (
    "delete it and packed/ beside it: adapters of the start-up options are registered anew, others must be"
    " loaded again"
)


class Database:
    """One connection for writes, in transactions, and one for reads, which a writer never holds up (WAL).

    Raises StateError, StateFullError: in words for an operator, whichever way SQLite says it.
    """

    def __init__(self, file: Path, schema: str, upgrades: Mapping[int, str] | None = None) -> None:
        """`upgrades`: by version, the statement that makes a file of it one of the next."""
        self.file = file
        self._upgrades = upgrades or {}
        self._turn, self._reading = threading.Lock(), threading.Lock()
        self._locked_until = 0.0
        with self._explained():
            self._writer = _connect(file)
            self._reader = _connect(file)
            with self._explained():
                self._create(schema)

    def _create(self, schema: str) -> None:
        [[version]] = self._writer.execute("PRAGMA user_version").fetchall()
        if version in self._upgrades:
            version = self._upgrade()
        if version == VERSION:
            return
        if version or self._writer.execute("SELECT name FROM sqlite_master WHERE name = 'base'").fetchall():
            raise StateError(
                f"the registry {self.file} was written by another version of Toppings; {_ADVICE}"
            )
        self._writer.execute("PRAGMA journal_mode = WAL")
        with self.transaction():
            for statement in schema.split(";"):
                self._writer.execute(statement)
            self._writer.execute(f"PRAGMA user_version = {VERSION}")

    def _upgrade(self) -> int:
        """The version it has then; another process may have been faster."""
        with self.transaction():
            [[version]] = self._writer.execute("PRAGMA user_version").fetchall()
            while version in self._upgrades:
                self._writer.execute(self._upgrades[version])
                version += 1
                self._writer.execute(f"PRAGMA user_version = {version}")
        return int(version)

    def check(self) -> None:
        """Raises StateError where the file is damaged or cannot be written to now."""
        with self._explained():
            [[verdict]] = self._writer.execute("PRAGMA quick_check(1)").fetchall()
        if verdict != "ok":
            raise StateError(f"the registry {self.file} is damaged ({verdict}); {_ADVICE}")
        with self.transaction():
            pass

    @contextmanager
    def transaction(
        self, after: Callable[[sqlite3.Connection], None] = lambda _: None
    ) -> Iterator[sqlite3.Connection]:
        """All that is written within, or nothing. `after` is called when it is committed, before the next one
        of this process begins."""
        if not self._turn.acquire(timeout=TURN_WAIT_S):
            raise StateError(f"the registry {self.file} has been written to for {TURN_WAIT_S:g} s")
        try:
            with self._explained():
                self._begin()
                try:
                    yield self._writer
                    self._writer.execute("COMMIT")
                    after(self._writer)
                except BaseException:
                    if self._writer.in_transaction:
                        with suppress(sqlite3.Error):
                            self._writer.execute("ROLLBACK")
                    raise
        finally:
            self._turn.release()

    def _begin(self) -> None:
        was_locked = time.monotonic() < self._locked_until
        wait_s = LOCKED_WAIT_S if was_locked else LOCK_WAIT_S
        self._writer.execute(f"PRAGMA busy_timeout = {int(wait_s * 1e3)}")
        try:
            self._writer.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if _code(error) == sqlite3.SQLITE_BUSY:
                self._locked_until = time.monotonic() + LOCKED_MEMORY_S
            raise

    def read(self, query: str, values: tuple[object, ...] = ()) -> list[Any]:
        """What is committed."""
        with self._reading, self._explained():
            return self._reader.execute(query, values).fetchall()

    def close(self) -> None:
        with self._turn, self._reading:
            self._writer.close()
            self._reader.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = _code(error)
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StateError(
                    f"the registry {self.file} is locked by another process; try again later"
                ) from error
            if code == sqlite3.SQLITE_FULL:
                raise StateFullError(f"the disk of the registry {self.file} is full") from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise StateError(f"the registry {self.file} is damaged ({error}); {_ADVICE}") from error
            if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
                raise StateError(
                    f"cannot write to the registry {self.file} ({error}); give the server write access to its"
                    " directory, or name another one with --state-dir"
                ) from error
            if code == sqlite3.SQLITE_IOERR or isinstance(error, sqlite3.OperationalError):
                raise StateError(f"the registry {self.file} cannot be used: {error}") from error
            raise


def _connect(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        file,
        timeout=LOCK_WAIT_S,
        isolation_level=None,  # transactions are begun by hand
        check_same_thread=False,  # every use is under a lock
    )
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _code(error: sqlite3.Error) -> int | None:
    """The primary result code; None where the error is not SQLite's."""
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF
