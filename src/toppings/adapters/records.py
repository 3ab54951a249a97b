"""A registered adapter, and the tables of the process that alone registers any."""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from toppings.adapters.merges import Merge
from toppings.adapters.vocabulary import Vocabulary


class Origin(StrEnum):
    """What registered an adapter. One of start-up options lasts as long as they name it, others until they
    are removed."""

    STARTUP = "startup"
    HTTP = "http"
    CLI = "cli"
    LIBRARY = "library"
    SOURCE = "source"
    """A request that named it, from a configured source: until its room is needed, or the source is gone."""


@dataclass(frozen=True)
class AdapterRecord:
    """A registered adapter. `rank` is its largest, `step_rank` what it counts for in a step (step_rank.py);
    `num_bytes` what it takes on host and device alike."""

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
    origin: Origin
    trained_on: str  # its configuration's base_model_name_or_path, "" where that says nothing
    fingerprint: str  # of its source's files when it was registered
    invocation_tokens: tuple[int, ...]  # of an activated LoRA; else empty
    merge: Merge | None = None  # of which adapters it is one; else None
    vocabulary: Vocabulary | None = None  # its own, where it has one
    step_rank: int = 0  # in a file of an earlier version `rank` counts

    def __post_init__(self) -> None:
        object.__setattr__(self, "step_rank", self.step_rank or self.rank)

    @property
    def is_made_here(self) -> bool:
        """Its packed file can be made again without a source: from a directory, or of a merge's parts."""
        return self.path.startswith("/") or self.merge is not None


Records: TypeAlias = list[AdapterRecord]


class RecordTable:
    """All records in memory. Look-ups take no lock, so that nobody who writes holds up a request."""

    def __init__(self, records: Iterable[tuple[AdapterRecord, bool]]) -> None:
        """`records` with whether each is live, oldest first."""
        self.version = 0
        self._by_id: dict[int, AdapterRecord] = {}
        self._by_name: dict[str, AdapterRecord] = {}
        self._by_path: dict[str, dict[int, AdapterRecord]] = {}
        self._pinned: dict[int, AdapterRecord] = {}
        self._listed: tuple[int, Records] = (-1, [])
        self._lock = threading.Lock()  # of writers
        for record, is_live in records:
            self.put(record, is_live=is_live)

    def put(self, record: AdapterRecord, *, is_live: bool) -> None:
        with self._lock:
            adapter_id = record.adapter_id
            self._by_id[adapter_id] = record
            for table in (self._pinned, self._by_path.setdefault(record.path, {})):
                table.pop(adapter_id, None)
            if is_live:
                self._by_name[record.name] = self._by_path[record.path][adapter_id] = record
                if record.is_pinned:
                    self._pinned[adapter_id] = record
            else:
                self._forget_name(record)
            self.version += 1

    def drop(self, adapter_id: int) -> None:
        """Of one that is not live."""
        with self._lock:
            record = self._by_id.pop(adapter_id, None)
            if record is not None:
                self._forget_name(record)
                self.version += 1

    def _forget_name(self, record: AdapterRecord) -> None:
        named = self._by_name.get(record.name)
        if named is not None and named.adapter_id == record.adapter_id:
            del self._by_name[record.name]
        if not self._by_path.get(record.path):
            self._by_path.pop(record.path, None)

    def named(self, name: str) -> AdapterRecord | None:
        return self._by_name.get(name)

    def with_id(self, adapter_id: int) -> AdapterRecord | None:
        return self._by_id.get(adapter_id)

    def from_path(self, path: str) -> AdapterRecord | None:
        """The newest one."""
        records = list(self._by_path.get(path, {}).values())
        return records[-1] if records else None

    def live(self) -> Records:
        """By name."""
        version, records = self._listed
        if version != self.version:
            version = self.version
            records = sorted(self._by_name.copy().values(), key=lambda record: record.name)
            self._listed = version, records
        return list(records)

    def pinned(self) -> Records:
        return list(self._pinned.copy().values())

    def count(self) -> int:
        return len(self._by_name)
