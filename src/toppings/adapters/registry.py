"""Which adapters exist: one SQLite file and the packed files beside it, both surviving any crash.

A registered adapter is a snapshot: it is served from its packed file whatever becomes of its source, until it
is registered again. Its id is never used twice, so a reload is another adapter to all who know it by id.

    register ---- live ----> remove (or a reload) ---- removed ----> purge
                  found by name and id                 found by id only: requests that hold the id still run
"""

import json
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from toppings.adapters.checkpoint import fingerprint
from toppings.adapters.errors import AdapterError, AdapterExists, AdapterNotFound
from toppings.adapters.layout import DTYPE_BYTES, BaseShapes
from toppings.adapters.packed import PackedAdapter, PackedFileError
from toppings.adapters.packed_dir import PackedCandidate, PackedDir
from toppings.adapters.peft_config import CONFIG_FILE

__all__ = ["AdapterExists", "AdapterNotFound", "AdapterRecord", "AdapterRegistry", "DirectoryReport"]

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 30.0
BATCH_SIZE = 128  # adapters of a directory that are registered in one transaction
_NAME = re.compile(r"[^\x00-\x20\x7f,]([^\x00-\x1f\x7f,]{0,254}[^\x00-\x20\x7f,])?")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS base (fields TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS adapters (
    adapter_id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL, path TEXT NOT NULL, base_model TEXT NOT NULL, rank INTEGER NOT NULL,
    targets TEXT NOT NULL, num_bytes INTEGER NOT NULL, digest TEXT NOT NULL, created_at REAL NOT NULL,
    is_pinned INTEGER NOT NULL, fingerprint TEXT NOT NULL, removed_at REAL
);
CREATE UNIQUE INDEX IF NOT EXISTS live_names ON adapters (name) WHERE removed_at IS NULL;
"""
_COLUMNS = "adapter_id, name, path, base_model, rank, targets, num_bytes, digest, created_at, is_pinned"
_INSERT = (
    f"INSERT INTO adapters ({_COLUMNS.removeprefix('adapter_id, ')}, fingerprint) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_IS_NAMED = "name = ? AND removed_at IS NULL"


@dataclass(frozen=True)
class AdapterRecord:
    """A registered adapter. `rank` is its largest; `num_bytes` what it takes on host and device alike."""

    adapter_id: int
    name: str
    path: str
    packed_path: str
    base_model: str
    rank: int
    targets: tuple[str, ...]
    num_bytes: int
    digest: str
    created_at: float  # Unix seconds
    is_pinned: bool


Records: TypeAlias = list[AdapterRecord]
Ids: TypeAlias = list[int]
Candidates: TypeAlias = list[tuple[str, PackedCandidate]]  # with their names
_Row: TypeAlias = tuple[int, str, str, str, int, str, int, str, float, int]


@dataclass
class DirectoryReport:
    """What `register_directory` did; `failures` by name."""

    registered: Records = field(default_factory=list)
    num_unchanged: int = 0
    failures: dict[str, AdapterError] = field(default_factory=dict)


class AdapterRegistry:
    """The adapters of one base model and dtype, kept in `state_dir`; `base_model` is the name it goes by.

    Any number of threads and processes may use it at once. Raises ValueError where the directory belongs to a
    base model of other sizes or to another dtype.
    """

    def __init__(self, state_dir: str | Path, base_model: str, shapes: BaseShapes, dtype: str) -> None:
        assert dtype in DTYPE_BYTES
        self.state_dir = Path(state_dir).absolute()
        self.base_model = base_model
        self.shapes = shapes
        self.dtype = dtype
        self._packed_dir = PackedDir(self.state_dir / "packed", shapes, dtype)
        self._lock = threading.RLock()
        self._db = sqlite3.connect(
            self.state_dir / "registry.sqlite",
            timeout=LOCK_TIMEOUT_S,
            isolation_level=None,  # transactions are begun by hand
            check_same_thread=False,  # every use is under the lock
        )
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        with self._transaction():
            self._create_or_check()

    def _create_or_check(self) -> None:
        for statement in _SCHEMA.split(";"):
            self._db.execute(statement)
        mine = json.dumps({**asdict(self.shapes), "dtype": self.dtype})
        row = self._db.execute("SELECT fields FROM base").fetchone()
        if row is None:
            self._db.execute("INSERT INTO base VALUES (?)", (mine,))
        elif row[0] != mine:
            raise ValueError(
                f"the adapters in {self.state_dir} belong to another base model or dtype: {row[0]}; now "
                f"it is {mine}; use another state_dir, or delete this one"
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def compare_tokens(self, base_tokens: Mapping[str, int]) -> None:
        """From now on, adapters whose tokeniser adds other tokens than the base model's are warned of."""
        self._packed_dir.base_tokens = base_tokens

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # --- look up ---

    def get(self, name: str) -> AdapterRecord:
        """Raises AdapterNotFound."""
        records = self._select(_IS_NAMED, name)
        if not records:
            raise AdapterNotFound(f"no adapter is named {name!r}")
        return records[0]

    def get_by_id(self, adapter_id: int) -> AdapterRecord:
        """Live or removed, until it is purged: then raises AdapterNotFound."""
        records = self._select("adapter_id = ?", adapter_id)
        if not records:
            raise AdapterNotFound(f"no adapter has id {adapter_id}")
        return records[0]

    def find(self, name: str, digest: str) -> AdapterRecord | None:
        """The newest adapter of this name and content: a live one, else a removed one not purged yet."""
        order = "ORDER BY removed_at IS NULL DESC, adapter_id DESC"
        return next(iter(self._select(f"name = ? AND digest = ? {order}", name, digest)), None)

    def list(self) -> Records:
        """All live adapters by name."""
        return self._select("removed_at IS NULL ORDER BY name")

    def live_ids(self, *, is_pinned: bool = False) -> Ids:
        """Ids of all live adapters, oldest first; with `is_pinned` of the pinned ones only."""
        query = "SELECT adapter_id FROM adapters WHERE removed_at IS NULL AND is_pinned >= ?"
        with self._lock:
            return [row[0] for row in self._db.execute(f"{query} ORDER BY adapter_id", (is_pinned,))]

    def count(self) -> int:
        with self._lock:
            row = self._db.execute("SELECT COUNT(*) FROM adapters WHERE removed_at IS NULL").fetchone()
        return int(row[0])

    def _select(self, condition: str, *values: object) -> Records:
        with self._lock:
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM adapters WHERE {condition}", values).fetchall()
        return [self._record(row) for row in rows]

    def _record(self, row: _Row) -> AdapterRecord:
        adapter_id, name, path, base_model, rank, targets, num_bytes, digest, created_at, is_pinned = row
        return AdapterRecord(
            adapter_id=adapter_id,
            name=name,
            path=path,
            packed_path=str(self._packed_dir.file(adapter_id)),
            base_model=base_model,
            rank=rank,
            targets=tuple(targets.split(",")),
            num_bytes=num_bytes,
            digest=digest,
            created_at=created_at,
            is_pinned=bool(is_pinned),
        )

    # --- register ---

    def register(
        self, name: str, path: str | Path, *, replace: bool = False, digest: str = ""
    ) -> AdapterRecord:
        """Validates and packs the PEFT checkpoint in `path`; on any failure nothing is left behind.

        With `replace`, an adapter of this name becomes a removed one as the new one takes its name and pin.
        With `digest`, only this content will do. Raises AdapterExists, AdapterNotFound (no directory at
        `path`), AdapterError (the reason).
        """
        _check_name(name)
        if not replace and self._select(_IS_NAMED, name):
            raise _name_is_taken(name)
        candidate = self._packed_dir.pack(path, is_synced=True)
        if digest and candidate.header.digest != digest:
            candidate.discard()
            raise AdapterError(
                f"the adapter at {path} has changed since {name!r} was registered; load it again"
            )
        return self._commit([(name, candidate)], replace=replace)[0]

    def adopt(self, candidates: Candidates) -> Records:
        """Registers packed files that were made elsewhere, in one transaction; they are the registry's from
        now on. Raises AdapterExists, and AdapterError for a name that is not allowed: then all are deleted.
        """
        try:
            for name, _ in candidates:
                _check_name(name)
        except AdapterError:
            for _, candidate in candidates:
                candidate.discard()
            raise
        return self._commit(candidates, replace=False)

    def register_directory(self, directory: str | Path) -> DirectoryReport:
        """Registers every sub-directory that holds a PEFT configuration, under its own name.

        Those whose files have the size and time they had when they were registered are skipped; changed ones
        are registered again. Raises AdapterNotFound where `directory` is none.
        """
        if not Path(directory).is_dir():
            raise AdapterNotFound(f"no directory of adapters at {directory}")
        root = os.path.abspath(directory)
        paths = {entry.name: f"{root}/{entry.name}" for entry in os.scandir(root) if entry.is_dir()}
        return self._register_changed(paths)

    def refresh(self) -> DirectoryReport:
        """Registers live adapters again whose source has changed; one whose source is gone stays as it is."""
        with self._lock:
            rows = self._db.execute("SELECT name, path FROM adapters WHERE removed_at IS NULL").fetchall()
        return self._register_changed(dict(rows))

    def _register_changed(self, paths: dict[str, str]) -> DirectoryReport:
        report = DirectoryReport()
        with self._lock:
            query = "SELECT name, path, fingerprint FROM adapters WHERE removed_at IS NULL"
            known = {row[0]: row[1:] for row in self._db.execute(query)}
        changed = {name: path for name, path in paths.items() if known.get(name) != (path, _mark(path))}
        changed = {name: path for name, path in changed.items() if os.path.exists(f"{path}/{CONFIG_FILE}")}
        report.num_unchanged = len(paths.keys() & known.keys() - changed.keys())
        names = iter(sorted(changed))
        while batch := list(islice(names, BATCH_SIZE)):
            candidates = self._pack_all({name: changed[name] for name in batch}, report.failures)
            report.registered += self._commit(candidates, replace=True)
        return report

    def _pack_all(self, paths: dict[str, str], failures: dict[str, AdapterError]) -> Candidates:
        """Files are not flushed: one that a power cut leaves short is made again when it is read."""
        candidates = []
        for name, path in paths.items():
            try:
                _check_name(name)
                candidates.append((name, self._packed_dir.pack(path, is_synced=False)))
            except AdapterError as error:
                failures[name] = error
        return candidates

    def _commit(self, candidates: Candidates, *, replace: bool) -> Records:
        """Rows and final file names in one transaction.

        A crash between the two leaves at most files without a row, under ids that the next adapters take.
        """
        try:
            with self._transaction():
                adapter_ids = [self._insert(name, c, replace=replace) for name, c in candidates]
        except BaseException:
            for _, candidate in candidates:
                candidate.discard()
            raise
        return [self.get_by_id(adapter_id) for adapter_id in adapter_ids]

    def _insert(self, name: str, candidate: PackedCandidate, *, replace: bool) -> int:
        old = self._select(_IS_NAMED, name)
        if old and not replace:
            raise _name_is_taken(name)
        if old:
            self._mark_removed(old[0].adapter_id)
        header, layout = candidate.header, candidate.header.layout
        values = (
            *(name, str(candidate.checkpoint.path), self.base_model, layout.max_rank),
            *(",".join(layout.targets), layout.num_bytes, header.digest, time.time()),
            *(bool(old) and old[0].is_pinned, header.fingerprint),
        )
        adapter_id = self._db.execute(_INSERT, values).lastrowid
        assert adapter_id is not None
        self._packed_dir.adopt(candidate, adapter_id)
        return adapter_id

    # --- change and remove ---

    def set_pinned(self, name: str, is_pinned: bool) -> AdapterRecord:
        """Remembers that the adapter is to be kept on the device. Raises AdapterNotFound."""
        with self._transaction():
            adapter_id = self.get(name).adapter_id
            query = "UPDATE adapters SET is_pinned = ? WHERE adapter_id = ?"
            self._db.execute(query, (is_pinned, adapter_id))
            return self.get_by_id(adapter_id)

    def remove(self, name: str) -> AdapterRecord:
        """Frees the name; who holds the id can still read it until `purge`. Raises AdapterNotFound."""
        with self._transaction():
            record = self.get(name)
            self._mark_removed(record.adapter_id)
        return record

    def _mark_removed(self, adapter_id: int) -> None:
        query = "UPDATE adapters SET removed_at = ? WHERE adapter_id = ?"
        self._db.execute(query, (time.time(), adapter_id))

    def purge(self, adapter_id: int) -> None:
        """Deletes a removed adapter's row and packed file; nothing happens to a live or unknown one."""
        query = "DELETE FROM adapters WHERE adapter_id = ? AND removed_at IS NOT NULL"
        with self._transaction():
            if self._db.execute(query, (adapter_id,)).rowcount:
                self._packed_dir.delete(adapter_id)

    def clean_up(self) -> None:
        """Purges all removed adapters and what crashes left; for a server's start, before its engine's."""
        with self._transaction():
            self._db.execute("DELETE FROM adapters WHERE removed_at IS NOT NULL")
            self._packed_dir.delete_all_but(set(self.live_ids()))

    # --- packed files ---

    def open_packed(self, adapter_id: int) -> PackedAdapter:
        """The adapter's packed file, made again from its source where it is missing or damaged.

        Raises AdapterError where that is impossible.
        """
        record = self.get_by_id(adapter_id)
        try:
            return self._packed_dir.open(adapter_id, record.digest)
        except PackedFileError as error:
            logger.warning("adapter %s: %s; making it again from %s", record.name, error, record.path)
            self.rebuild(adapter_id)
            return self._packed_dir.open(adapter_id, record.digest)

    def rebuild(self, adapter_id: int) -> None:
        """Makes the packed file again. Raises AdapterError where the source is gone or has changed."""
        record = self.get_by_id(adapter_id)
        candidate = self._packed_dir.pack(record.path, is_synced=True)
        if candidate.header.digest != record.digest:
            candidate.discard()
            raise AdapterError(
                f"the packed file of adapter {record.name!r} is damaged, and {record.path} has changed since "
                "it was registered; register it again"
            )
        self._packed_dir.adopt(candidate, adapter_id)


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise AdapterError(
            f"adapter name {name!r} is not allowed: 1 to 256 characters, no comma, no control characters, no "
            "blank at either end"
        )


def _name_is_taken(name: str) -> AdapterExists:
    return AdapterExists(f"an adapter named {name!r} is registered already; replace it or remove it first")


def _mark(path: str) -> str | None:
    with suppress(OSError):
        return fingerprint(path)
    return None
