"""Which adapters exist: one SQLite file and the packed files beside it, both surviving any crash.

A registered adapter is a snapshot: it is served from its packed file whatever becomes of its source, until it
is registered again. Its id is never used twice, so a reload is another adapter to all who know it by id.

    register ---- live ----> remove (or a reload) ---- removed ----> purge
                  found by name and id                 found by id only: requests that hold the id still run

What start-up options name lasts as long as they name it; all else until it is removed.
"""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from toppings.adapters.capacity import Capacity
from toppings.adapters.checkpoint import fingerprint, read_checkpoint
from toppings.adapters.directories import find_adapters
from toppings.adapters.errors import AdapterError, AdapterExists, AdapterNotFound, StateError
from toppings.adapters.latest import Latest
from toppings.adapters.layout import DTYPE_BYTES, BaseShapes
from toppings.adapters.names import check_name, is_same_base
from toppings.adapters.packed import PackedAdapter, PackedFileError
from toppings.adapters.packed_dir import PackedCandidate, PackedDir
from toppings.adapters.records import AdapterRecord, Origin, Records
from toppings.adapters.rows import AdapterRows, Ids, RowChange
from toppings.adapters.startup_report import DirectoryReport
from toppings.adapters.state_lock import StateLock

__all__ = [
    "AdapterExists",
    "AdapterNotFound",
    "AdapterRecord",
    "AdapterRegistry",
    "DirectoryReport",
    "Origin",
]

logger = logging.getLogger(__name__)

PACKED = "packed"
MAX_TOLD = 1024  # adapters whose lost file is remembered as told
BATCH_SIZE = 128  # adapters of a directory that are registered in one transaction

Candidates: TypeAlias = list[tuple[str, PackedCandidate]]  # with their names


class AdapterRegistry:
    """The adapters of one base model and dtype, kept in `state_dir`.

    With an exclusive `lock` it is the directory's only writer: records are kept in memory, and no look-up
    waits for the disk. Otherwise any number of threads and processes may use it at once. `base_model` is the
    name the base model goes by in requests, `base_names` others it is known by to adapters' configurations;
    with `is_strict`, those that name another one are refused. `identity` is that of its weights. `capacity`
    bounds what is registered; None: nothing does.

    All that write raise StateError where the disk or another process does not let them; nothing has changed
    then. Raises ValueError where the directory belongs to another base model or dtype.
    """

    def __init__(
        self,
        state_dir: str | Path,
        base_model: str,
        shapes: BaseShapes,
        dtype: str,
        *,
        identity: str = "",
        base_names: Collection[str] = (),
        is_strict: bool = False,
        capacity: Capacity | None = None,
        lock: StateLock | None = None,
    ) -> None:
        assert dtype in DTYPE_BYTES
        self.state_dir = Path(state_dir).absolute()
        self.base_model = base_model
        self.base_names = frozenset((base_model, *base_names))
        self.shapes = shapes
        self.dtype = dtype
        self.capacity = capacity
        self._is_strict = is_strict
        self._locks = [lock] if lock is not None else []
        self._is_only_writer = lock is not None and not lock.is_shared
        self._told: Latest[int, None] = Latest(MAX_TOLD)  # adapters whose packed file was said to be lost
        self._packed_dir = PackedDir(self.state_dir / PACKED, shapes, dtype)
        self._rows = AdapterRows(self.state_dir, self.state_dir / PACKED)
        self._rows.check_base({**asdict(shapes), "dtype": dtype, "identity": identity})
        if self._is_only_writer:
            self._rows.keep_in_memory()

    def compare_tokens(self, base_tokens: Mapping[str, int]) -> None:
        """From now on, adapters whose tokeniser adds other tokens than the base model's are warned of."""
        self._packed_dir.base_tokens = base_tokens

    def close(self) -> None:
        self._rows.close()
        for lock in self._locks:
            lock.close()

    def keep_open(self, lock: StateLock) -> None:
        """Another lock that is closed with the registry."""
        self._locks.append(lock)

    # --- look up ---

    def find_named(self, name: str) -> AdapterRecord | None:
        return self._rows.named(name)

    def get(self, name: str) -> AdapterRecord:
        """Raises AdapterNotFound."""
        record = self._rows.named(name)
        if record is None:
            raise AdapterNotFound(f"no adapter is named {name!r}")
        return record

    def get_by_id(self, adapter_id: int) -> AdapterRecord:
        """Live or removed, until it is purged: then raises AdapterNotFound."""
        record = self._rows.with_id(adapter_id)
        if record is None:
            raise AdapterNotFound(f"no adapter has id {adapter_id}")
        return record

    def find_from(self, path: str) -> AdapterRecord | None:
        """The newest live adapter that was loaded from the absolute `path`."""
        return self._rows.from_path(path)

    def find(self, name: str, digest: str) -> AdapterRecord | None:
        """The newest adapter of this name and content: a live one, else a removed one not purged yet."""
        return self._rows.of_content(name, digest)

    def list(self) -> Records:
        """All live adapters by name."""
        return self._rows.live()

    def version(self) -> int:
        """Another number whenever `list` has changed."""
        return self._rows.version()

    def live_ids(self, *, is_pinned: bool = False) -> Ids:
        """Ids of all live adapters, oldest first; with `is_pinned` of the pinned ones only."""
        records = self._rows.pinned() if is_pinned else self._rows.live()
        return sorted(record.adapter_id for record in records)

    def count(self) -> int:
        return self._rows.count()

    # --- register ---

    def register(
        self,
        name: str,
        path: str | Path,
        *,
        replace: bool = False,
        digest: str = "",
        origin: Origin = Origin.LIBRARY,
        source: str = "",
        roots: Sequence[Path] | None = None,
        max_bytes: int | None = None,
    ) -> AdapterRecord:
        """Validates and packs the PEFT checkpoint in `path`; on any failure nothing is left behind.

        With `replace`, an adapter of this name becomes a removed one as the new one takes its name and pin.
        With `digest`, only this content will do. `source` says where the files came from that are in `path`
        for now; the record says it too, and an adapter of another base model is refused then. `roots`: where
        links of its files may lead; None: anywhere. `max_bytes`: the most that it may take. Raises
        AdapterExists, AdapterNotFound (no directory at `path`), AdapterError (the reason).
        """
        check_name(name, self.base_model)
        if not replace and self.find_named(name) is not None:
            raise AdapterExists(f"an adapter named {name!r} is registered already")
        candidate = self._packed_dir.pack(path, is_synced=True, roots=roots)
        try:
            if digest and candidate.header.digest != digest:
                raise AdapterError(
                    f"the adapter at {path} has changed since {name!r} was registered; load it again"
                )
            num_bytes = candidate.header.layout.num_bytes
            if max_bytes is not None and num_bytes > max_bytes:
                raise AdapterError(f"it takes {num_bytes} bytes, and {max_bytes} are left for it")
            self._check(
                name,
                num_bytes,
                candidate.checkpoint.base_model,
                is_strict=bool(source),
            )
        except BaseException:
            candidate.discard()
            raise
        [record] = self._commit([(name, candidate)], replace=replace, origin=origin, source=source)
        if (doubt := self.doubt_of(record)) is not None:
            logger.warning("%s", doubt)
        return record

    def is_of_content(self, record: AdapterRecord, path: str | Path) -> bool:
        """Whether `record` was made from what is in `path`. Raises AdapterError where that is no adapter that
        can be served."""
        return record.digest == read_checkpoint(Path(path), self.shapes).digest

    def adopt(self, candidates: Candidates) -> Records:
        """Registers packed files that were made elsewhere, in one transaction; they are the registry's from
        now on. Raises AdapterExists, and AdapterError for a name that is not allowed: then all are deleted.
        """
        try:
            for name, _ in candidates:
                check_name(name, self.base_model)
        except AdapterError:
            for _, candidate in candidates:
                candidate.discard()
            raise
        return self._commit(candidates, replace=False, origin=Origin.LIBRARY)

    def doubt_of(self, record: AdapterRecord) -> str | None:
        """What speaks against serving it: it says that it was trained on another base model."""
        if is_same_base(record.trained_on, self.base_names):
            return None
        return _of_another_base(record.name, record.trained_on, self.base_model)

    def _check(self, name: str, num_bytes: int, trained_on: str, *, is_strict: bool = False) -> None:
        """Raises AdapterError for what today's settings do not allow."""
        check_name(name, self.base_model)
        if (is_strict or self._is_strict) and not is_same_base(trained_on, self.base_names):
            why = "" if is_strict else " (strict_base)"
            raise AdapterError(f"{_of_another_base(name, trained_on, self.base_model)}{why}")
        if self.capacity is not None:
            self.capacity.check_beside(name, num_bytes, [r for r in self._rows.pinned() if r.name != name])

    def register_directory(self, directory: str | Path | None) -> DirectoryReport:
        """Makes the adapters of start-up options those of `directory` (`find_adapters`), or none.

        Those whose files have the size and time they had when they were registered are skipped, changed ones
        registered again, and those that are not there any more or cannot be served removed. An adapter that
        came otherwise gives way to one of its name; the others stay if today's settings allow them.
        Raises AdapterNotFound where `directory` is none, AdapterError where it may not be read.
        """
        report = DirectoryReport(str(directory or ""))
        paths: dict[str, str] = {}
        if directory is not None:
            paths, report.failures = find_adapters(directory)
        known = {record.name: record for record in self.list()}
        kept, changed = self._sort(paths, known, report)
        names = iter(sorted(changed))
        while batch := list(islice(names, BATCH_SIZE)):
            candidates = self._pack_all({name: changed[name] for name in batch}, report.failures)
            report.registered += self._commit(candidates, replace=True, origin=Origin.STARTUP)
        self._note_kept([record for record in kept if record.origin is not Origin.STARTUP])
        gone = [
            record
            for name, record in known.items()
            if name in report.failures or (record.origin is Origin.STARTUP and name not in paths)
        ]
        if gone:
            with self._rows.change() as change:
                change.remove([record.adapter_id for record in gone])
        report.removed = [record for record in gone if record.name not in report.failures]
        report.note(known, kept, self.doubt_of)
        return report

    def _sort(
        self, paths: dict[str, str], known: dict[str, AdapterRecord], report: DirectoryReport
    ) -> tuple[Records, dict[str, str]]:
        """Those that are registered as they are, and the paths of the others."""
        kept, changed = [], {}
        for name, path in paths.items():
            record = known.get(name)
            if record is None or (record.path, record.fingerprint) != (path, _mark(path)):
                changed[name] = path
            else:
                kept.append(record)
        others = [r for r in known.values() if r.origin is not Origin.STARTUP and r.name not in paths]
        for record in [*kept, *others]:
            try:
                self._check(record.name, record.num_bytes, record.trained_on)
            except AdapterError as error:
                report.failures[record.name] = error
        kept = [record for record in kept if record.name not in report.failures]
        report.num_unchanged = len(kept)
        return kept, changed

    def _pack_all(self, paths: dict[str, str], failures: dict[str, AdapterError]) -> Candidates:
        """Files are not flushed: one that a power cut leaves short is made again when it is read."""
        candidates = []
        for name, path in paths.items():
            candidate = None
            try:
                check_name(name, self.base_model)
                candidate = self._packed_dir.pack(path, is_synced=False)
                self._check(name, candidate.header.layout.num_bytes, candidate.checkpoint.base_model)
                candidates.append((name, candidate))
            except (AdapterError, StateError) as error:
                if candidate is not None:
                    candidate.discard()
                failures[name] = error if isinstance(error, AdapterError) else AdapterError(str(error))
        return candidates

    def _note_kept(self, records: Records) -> None:
        """They last as long as the start-up options from now on."""
        if records:
            with self._rows.change() as change:
                change.set("origin", Origin.STARTUP, [record.adapter_id for record in records])

    def _commit(self, candidates: Candidates, *, replace: bool, origin: Origin, source: str = "") -> Records:
        """Rows and final file names in one transaction.

        A crash between the two leaves at most files without a row, under ids that the next adapters take.
        """
        if not candidates:
            return []
        try:
            with self._rows.change() as change:
                new = [
                    self._insert(change, *each, replace=replace, origin=origin, source=source)
                    for each in candidates
                ]
        except BaseException:
            for _, candidate in candidates:
                candidate.discard()
            raise
        return [self.get_by_id(adapter_id) for adapter_id in new]

    def _insert(
        self,
        change: RowChange,
        name: str,
        candidate: PackedCandidate,
        *,
        replace: bool,
        origin: Origin,
        source: str,
    ) -> int:
        header, layout = candidate.header, candidate.header.layout
        fields = {
            "name": name,
            "path": source or str(candidate.checkpoint.path),
            "base_model": self.base_model,
            "rank": layout.max_rank,
            "targets": ",".join(layout.targets),
            "num_bytes": layout.num_bytes,
            "digest": header.digest,
            "created_at": time.time(),
            "origin": origin,
            "trained_on": candidate.checkpoint.base_model,
            "fingerprint": header.fingerprint,
            "invocation_tokens": ",".join(map(str, candidate.checkpoint.invocation_tokens)),
        }
        adapter_id = change.insert(fields, replace=replace)
        self._packed_dir.adopt(candidate, adapter_id)
        return adapter_id

    # --- change and remove ---

    def check_pin(self, name: str) -> None:
        """Raises AdapterNotFound, and AdapterError where it, or another one beside it, would not fit."""
        record = self.get(name)
        if self.capacity is not None and not record.is_pinned:
            others = [each for each in self.list() if not each.is_pinned and each.name != name]
            self.capacity.check_pin(record, self._rows.pinned(), others)

    def set_pinned(self, name: str, is_pinned: bool) -> AdapterRecord:
        """Remembers that the adapter is to be kept on the device. Raises AdapterNotFound."""
        with self._rows.change() as change:
            adapter_id = change.id_of(name)
            change.set("is_pinned", is_pinned, [adapter_id])
        return self.get_by_id(adapter_id)

    def remove(self, name: str) -> AdapterRecord:
        """Frees the name; who holds the id can still read it until `purge`. Raises AdapterNotFound."""
        with self._rows.change() as change:
            adapter_id = change.id_of(name)
            change.remove([adapter_id])
        return self.get_by_id(adapter_id)

    def purge(self, adapter_id: int) -> None:
        """Deletes a removed adapter's row and packed file; nothing happens to a live or unknown one."""
        with self._rows.change() as change:
            if change.delete([adapter_id]):
                self._packed_dir.delete(adapter_id)

    def clean_up(self) -> None:
        """Purges all removed adapters and what crashes left; for a server's start, before its engine's."""
        with self._rows.change() as change:
            change.delete(self._rows.removed_ids())
            self._packed_dir.delete_all_but(set(self.live_ids()), are_others_writing=not self._is_only_writer)

    # --- packed files ---

    def open_packed(self, adapter_id: int) -> PackedAdapter:
        """The adapter's packed file, made again from its source where it is missing or damaged.

        Raises AdapterError where that is impossible, StateError where it cannot be written.
        """
        record = self.get_by_id(adapter_id)
        try:
            return self._packed_dir.open(adapter_id, record.digest)
        except PackedFileError as error:
            if adapter_id not in self._told:
                logger.warning("adapter %s: %s; making it again from %s", record.name, error, record.path)
            self._told[adapter_id] = None
            self.rebuild(adapter_id)
            self._told.pop(adapter_id, None)
            return self._packed_dir.open(adapter_id, record.digest)

    def is_intact(self, adapter_id: int) -> bool:
        """Whether the packed file is there and whole: all of it is read. Raises AdapterNotFound."""
        record = self.get_by_id(adapter_id)
        try:
            with self._packed_dir.open(adapter_id, record.digest) as packed:
                packed.check()
        except PackedFileError:
            return False
        return True

    def rebuild(self, adapter_id: int) -> None:
        """Makes the packed file again. Raises AdapterError where the source is gone or has changed, or is not
        on this machine: then a server fetches it again."""
        record = self.get_by_id(adapter_id)
        if not record.path.startswith("/"):
            raise AdapterError(
                f"the packed file of adapter {record.name!r} is damaged, and it came from {record.path}; "
                "pull or load it again"
            )
        candidate = self._packed_dir.pack(record.path, is_synced=True)
        if candidate.header.digest != record.digest:
            candidate.discard()
            raise AdapterError(
                f"the packed file of adapter {record.name!r} is damaged, and {record.path} has changed since "
                "it was registered; register it again"
            )
        self._packed_dir.adopt(candidate, adapter_id)


def _of_another_base(name: str, trained_on: str, base_model: str) -> str:
    return (
        f"adapter {name!r} says that it was trained on {trained_on!r}; the base model here is {base_model!r}"
    )


def _mark(path: str) -> str | None:
    with suppress(OSError):
        return fingerprint(path)
    return None
