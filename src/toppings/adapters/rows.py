"""The rows of registered adapters, live and removed: in SQLite, and in memory where nobody else writes."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection
from typing import Any, TypeAlias

from toppings.adapters.database import Database
from toppings.adapters.errors import AdapterExists, AdapterNotFound
from toppings.adapters.merges import Merge
from toppings.adapters.records import AdapterRecord, Origin, Records, RecordTable
from toppings.adapters.vocabulary import Vocabulary

DATABASE_FILE = "registry.sqlite"
_COLUMNS = (
    "adapter_id, name, path, base_model, rank, targets, num_bytes, digest, created_at, is_pinned, origin, "
    "trained_on, fingerprint, invocation_tokens, merge, vocabulary, step_rank"
)
_FIELDS = tuple(_COLUMNS.split(", "))
_SCHEMA = """
CREATE TABLE IF NOT EXISTS base (fields TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS adapters (
    adapter_id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL, path TEXT NOT NULL, base_model TEXT NOT NULL, rank INTEGER NOT NULL,
    targets TEXT NOT NULL, num_bytes INTEGER NOT NULL, digest TEXT NOT NULL, created_at REAL NOT NULL,
    is_pinned INTEGER NOT NULL, origin TEXT NOT NULL, trained_on TEXT NOT NULL, fingerprint TEXT NOT NULL,
    removed_at REAL, invocation_tokens TEXT NOT NULL DEFAULT '',
    merge TEXT NOT NULL DEFAULT '', vocabulary TEXT NOT NULL DEFAULT '',
    step_rank INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX IF NOT EXISTS live_names ON adapters (name) WHERE removed_at IS NULL;
CREATE INDEX IF NOT EXISTS live_paths ON adapters (path) WHERE removed_at IS NULL
"""
_UPGRADES = {
    2: "ALTER TABLE adapters ADD COLUMN invocation_tokens TEXT NOT NULL DEFAULT ''",
    3: "ALTER TABLE adapters ADD COLUMN merge TEXT NOT NULL DEFAULT ''",
    4: "ALTER TABLE adapters ADD COLUMN vocabulary TEXT NOT NULL DEFAULT ''",
    5: "ALTER TABLE adapters ADD COLUMN step_rank INTEGER NOT NULL DEFAULT 0",
}
"""What makes a file of this version one of the next."""
_LIVE = "removed_at IS NULL"
_IS_NAMED = f"name = ? AND {_LIVE}"
_VALUES = ", ".join(f":{name}" for name in _FIELDS[1:])
_INSERT = f"INSERT INTO adapters ({', '.join(_FIELDS[1:])}) VALUES ({_VALUES})"
_BATCH_SIZE = 500  # ids in one query

Ids: TypeAlias = list[int]


class AdapterRows:
    """The registry's table in `state_dir`; packed files are in `packed_dir`.

    Raises StateError, also from whatever changes it.
    """

    def __init__(self, state_dir: Path, packed_dir: Path) -> None:
        self._packed_dir = packed_dir
        self._db = Database(state_dir / DATABASE_FILE, _SCHEMA, _UPGRADES)
        self._table: RecordTable | None = None

    def keep_in_memory(self) -> None:
        """From now on nobody else writes."""
        rows = self._db.read(f"SELECT {_COLUMNS}, {_LIVE} FROM adapters ORDER BY adapter_id")
        self._table = RecordTable((self._record(row[:-1]), bool(row[-1])) for row in rows)

    def check_base(self, fields: Mapping[str, object]) -> None:
        """Notes whose adapters these are, of a new file. Raises ValueError where they are another's."""
        query, mine = "SELECT fields FROM base", json.dumps(fields)
        rows = self._db.read(query)
        if not rows:
            with self._db.transaction() as db:
                if not db.execute(query).fetchall():
                    db.execute("INSERT INTO base VALUES (?)", (mine,))
            rows = self._db.read(query)
        theirs, expected = json.loads(rows[0][0]), json.loads(mine)
        different = [
            f"{name} {theirs.get(name)} instead of {value}"
            for name, value in expected.items()
            if theirs.get(name) != value
        ]
        if different:
            raise ValueError(
                f"the adapters in {self._db.file.parent} belong to another base model or dtype: "
                f"{', '.join(different)}; use another state_dir, or delete this one"
            )

    def close(self) -> None:
        self._db.close()

    # --- look up ---

    def named(self, name: str) -> AdapterRecord | None:
        if self._table is not None:
            return self._table.named(name)
        return next(iter(self._select(_IS_NAMED, name)), None)

    def with_id(self, adapter_id: int) -> AdapterRecord | None:
        if self._table is not None:
            return self._table.with_id(adapter_id)
        return next(iter(self._select("adapter_id = ?", adapter_id)), None)

    def from_path(self, path: str) -> AdapterRecord | None:
        """The newest live one that came from there."""
        if self._table is not None:
            return self._table.from_path(path)
        return next(iter(self._select(f"path = ? AND {_LIVE} ORDER BY adapter_id DESC LIMIT 1", path)), None)

    def of_content(self, name: str, digest: str) -> AdapterRecord | None:
        """A live one, else the newest removed one."""
        order = f"ORDER BY {_LIVE} DESC, adapter_id DESC LIMIT 1"
        return next(iter(self._select(f"name = ? AND digest = ? {order}", name, digest)), None)

    def live(self) -> Records:
        """By name."""
        return self._select(f"{_LIVE} ORDER BY name") if self._table is None else self._table.live()

    def pinned(self) -> Records:
        return self._select(f"{_LIVE} AND is_pinned") if self._table is None else self._table.pinned()

    def count(self) -> int:
        """Of live ones."""
        if self._table is not None:
            return self._table.count()
        [[count]] = self._db.read(f"SELECT COUNT(*) FROM adapters WHERE {_LIVE}")
        return int(count)

    def version(self) -> int:
        """Another number whenever anything has changed."""
        if self._table is not None:
            return self._table.version
        [[version]] = self._db.read("PRAGMA data_version")
        return int(version)

    def removed_ids(self) -> Ids:
        rows = self._db.read("SELECT adapter_id FROM adapters WHERE removed_at IS NOT NULL")
        return [adapter_id for (adapter_id,) in rows]

    def _select(self, condition: str, *values: object) -> Records:
        try:
            rows = self._db.read(f"SELECT {_COLUMNS} FROM adapters WHERE {condition}", values)
        except (UnicodeEncodeError, OverflowError):  # no text or integer of SQLite's: no row has it
            return []
        return [self._record(row) for row in rows]

    def _record(self, row: tuple[Any, ...]) -> AdapterRecord:
        fields = dict(zip(_FIELDS, row, strict=True))
        fields["packed_path"] = str(self._packed_dir / f"{fields['adapter_id']}.pack")
        fields["targets"] = tuple(fields["targets"].split(","))
        tokens = fields["invocation_tokens"]
        fields["invocation_tokens"] = tuple(map(int, tokens.split(","))) if tokens else ()
        fields["merge"] = Merge.from_json(fields["merge"]) if fields["merge"] else None
        vocabulary = fields["vocabulary"]
        fields["vocabulary"] = Vocabulary.from_json(vocabulary) if vocabulary else None
        fields["is_pinned"] = bool(fields["is_pinned"])
        fields["origin"] = Origin(fields["origin"])
        return AdapterRecord(**fields)

    # --- change ---

    @contextmanager
    def change(self) -> Iterator["RowChange"]:
        """A transaction: all that is done within, or nothing."""
        changes: list[RowChange] = []

        def apply(db: Connection) -> None:
            if self._table is not None:
                self._reload(self._table, db, changes[0].ids)

        with self._db.transaction(after=apply) as db:
            changes.append(RowChange(db))
            yield changes[0]

    def _reload(self, table: RecordTable, db: Connection, ids: Ids) -> None:
        """Live ones first: a name that passes to a new generation is found at every moment."""
        rows: list[tuple[Any, ...]] = []
        for start in range(0, len(ids), _BATCH_SIZE):
            some = ids[start : start + _BATCH_SIZE]
            marks = ", ".join("?" * len(some))
            query = f"SELECT {_COLUMNS}, {_LIVE} FROM adapters WHERE adapter_id IN ({marks})"
            rows += db.execute(query, some).fetchall()
        for row in sorted(rows, key=lambda row: (not row[-1], row[0])):
            table.put(self._record(row[:-1]), is_live=bool(row[-1]))
        for adapter_id in set(ids) - {row[0] for row in rows}:
            table.drop(adapter_id)


def check_rows(state_dir: Path) -> None:
    """Raises StateError where the registry in this directory is damaged or cannot be written to now."""
    database = Database(state_dir / DATABASE_FILE, _SCHEMA, _UPGRADES)
    try:
        database.check()
    finally:
        database.close()


class RowChange:
    """What may be done in one transaction; `ids` are those of the rows that were touched."""

    def __init__(self, db: Connection) -> None:
        self.ids: Ids = []
        self._db = db

    def insert(self, fields: Mapping[str, object], *, replace: bool, over: int | None = None) -> int:
        """The new row's id; with `replace`, the one that has its name is removed and leaves it its pin.

        Raises AdapterExists without `replace`, and where not the one with the id `over` has the name.
        """
        name = fields["name"]
        query = f"SELECT adapter_id, is_pinned FROM adapters WHERE {_IS_NAMED}"
        old_id, is_pinned = self._db.execute(query, (name,)).fetchone() or (None, False)
        if old_id is not None and not replace:
            raise AdapterExists(
                f"an adapter named {name!r} is registered already; replace it or remove it first"
            )
        if over is not None and old_id != over:
            raise AdapterExists(f"adapter {name!r} was loaded or unloaded by somebody meanwhile")
        if old_id is not None:
            self.remove([old_id])
        adapter_id = self._db.execute(_INSERT, {**fields, "is_pinned": is_pinned}).lastrowid
        assert adapter_id is not None
        self.ids.append(adapter_id)
        return adapter_id

    def id_of(self, name: str) -> int:
        """Raises AdapterNotFound."""
        row = self._db.execute(f"SELECT adapter_id FROM adapters WHERE {_IS_NAMED}", (name,)).fetchone()
        if row is None:
            raise AdapterNotFound(f"no adapter is named {name!r}")
        return int(row[0])

    def set(self, column: str, value: object, ids: Ids) -> None:
        query = f"UPDATE adapters SET {column} = ? WHERE adapter_id = ?"
        self._db.executemany(query, [(value, adapter_id) for adapter_id in ids])
        self.ids += ids

    def remove(self, ids: Ids) -> None:
        self.set("removed_at", time.time(), ids)

    def delete(self, ids: Ids) -> Ids:
        """The rows of removed adapters; the ids of those that were there."""
        query = "DELETE FROM adapters WHERE adapter_id = ? AND removed_at IS NOT NULL"
        gone = [adapter_id for adapter_id in ids if self._db.execute(query, (adapter_id,)).rowcount]
        self.ids += gone
        return gone
