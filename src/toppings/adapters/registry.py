"""Which adapters exist: one SQLite file and the packed files beside it, both surviving any crash.

A registered adapter is a snapshot: it is served from its packed file whatever becomes of its source, until it
is registered again. Its id is never used twice, so a reload is another adapter to all who know it by id. What
is done with those that are there is in `catalogue.py`.

What start-up options name lasts as long as they name it; all else until it is removed.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from toppings.adapters.catalogue import AdapterCatalogue
from toppings.adapters.checkpoint import fingerprint
from toppings.adapters.directories import find_adapters
from toppings.adapters.errors import AdapterError, AdapterExists, AdapterNotFound, StateError
from toppings.adapters.merges import Merge
from toppings.adapters.names import check_name, is_same_base
from toppings.adapters.packed_dir import PackedCandidate
from toppings.adapters.records import AdapterRecord, Origin, Records
from toppings.adapters.rows import RowChange
from toppings.adapters.startup_report import DirectoryReport
from toppings.adapters.step_rank import step_rank

__all__ = [
    "AdapterExists",
    "AdapterNotFound",
    "AdapterRecord",
    "AdapterRegistry",
    "DirectoryReport",
    "Origin",
]

logger = logging.getLogger(__name__)

BATCH_SIZE = 128  # adapters of a directory that are registered in one transaction

Candidates: TypeAlias = list[tuple[str, PackedCandidate]]  # with their names


class AdapterRegistry(AdapterCatalogue):
    """The catalogue, and how adapters come into it."""

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
        over: AdapterRecord | None = None,
    ) -> AdapterRecord:
        """Validates and packs the PEFT checkpoint in `path`; on any failure nothing is left behind.

        With `replace`, an adapter of this name becomes a removed one as the new one takes its name and pin.
        With `digest`, only this content will do. `source` says where the files came from that are in `path`
        for now; the record says it too, and an adapter of another base model is refused then. `roots`: where
        links of its files may lead; None: anywhere. `max_bytes`: the most that it may take. `over`: with
        `replace`, the only one that may be replaced, still there: what somebody did meanwhile is not undone.
        Raises AdapterExists, AdapterNotFound (no directory at `path`), AdapterError (the reason).
        """
        self.check_free(name, replace=replace)
        candidate = self._packed_dir.pack(path, is_synced=True, roots=roots)
        try:
            if digest and candidate.header.digest != digest:
                raise AdapterError(
                    f"the adapter at {path} has changed since {name!r} was registered; load it again"
                )
            num_bytes = candidate.header.layout.num_bytes
            _check_bytes(num_bytes, max_bytes)
            self._check(name, num_bytes, candidate.trained_on, is_strict=bool(source))
        except BaseException:
            candidate.discard()
            raise
        [record] = self._commit([(name, candidate)], replace=replace, origin=origin, source=source, over=over)
        if (doubt := self.doubt_of(record)) is not None:
            logger.warning("%s", doubt)
        return record

    def merge(
        self,
        name: str,
        merge: Merge,
        *,
        replace: bool = False,
        origin: Origin = Origin.LIBRARY,
        max_bytes: int | None = None,
    ) -> AdapterRecord:
        """Registers the sum of adapters as one of its own, which stays as it is whatever becomes of them.

        What it is made of is in its record. `replace` and `max_bytes`, and raises, as `register`;
        AdapterNotFound also for a part that is not registered.
        """
        self.check_free(name, replace=replace)
        parts = [self.get(part.name) for part in merge.parts]
        trained_on = next((p.trained_on for p in parts if self.doubt_of(p)), parts[0].trained_on)
        with self._planned(merge, parts) as plan:
            num_bytes = plan.header.layout.num_bytes
            _check_bytes(num_bytes, max_bytes)
            self._check(name, num_bytes, trained_on)
            candidate = self._packed_dir.merge(plan, trained_on)
        [record] = self._commit([(name, candidate)], replace=replace, origin=origin)
        return record

    def check_free(self, name: str, *, replace: bool = False) -> None:
        """Raises AdapterError for a name that is not allowed, AdapterExists for one that is taken, not to be
        replaced."""
        check_name(name, self.base_model)
        if not replace and self.find_named(name) is not None:
            raise AdapterExists(f"an adapter named {name!r} is registered already")

    def is_of_content(self, record: AdapterRecord, path: str | Path) -> bool:
        """Whether `record` was made from what is in `path`. Raises AdapterError where that is no adapter that
        can be served."""
        return record.digest == self._packed_dir.digest_of(path)

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
                self._check(name, candidate.header.layout.num_bytes, candidate.trained_on)
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

    def _commit(
        self,
        candidates: Candidates,
        *,
        replace: bool,
        origin: Origin,
        source: str = "",
        over: AdapterRecord | None = None,
    ) -> Records:
        """Rows and final file names in one transaction.

        A crash between the two leaves at most files without a row, under ids that the next adapters take.
        """
        if not candidates:
            return []
        try:
            with self._rows.change() as change:
                new = [
                    self._insert(change, *each, replace=replace, origin=origin, source=source, over=over)
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
        over: AdapterRecord | None,
    ) -> int:
        header, layout = candidate.header, candidate.header.layout
        fields = {
            "name": name,
            "path": source or candidate.path,
            "base_model": self.base_model,
            "rank": max(layout.max_rank, *layout.outer_ranks.values(), 0),
            "step_rank": step_rank(layout, self.shapes),
            "targets": ",".join((*layout.targets, *layout.outer_ranks)),
            "num_bytes": layout.num_bytes,
            "digest": header.digest,
            "created_at": time.time(),
            "origin": origin,
            "trained_on": candidate.trained_on,
            "fingerprint": header.fingerprint,
            "invocation_tokens": ",".join(map(str, candidate.invocation_tokens)),
            "merge": candidate.merge.to_json() if candidate.merge is not None else "",
            "vocabulary": candidate.vocabulary.to_json() if candidate.vocabulary is not None else "",
        }
        adapter_id = change.insert(fields, replace=replace, over=None if over is None else over.adapter_id)
        self._packed_dir.adopt(candidate, adapter_id)
        return adapter_id


def _check_bytes(num_bytes: int, max_bytes: int | None) -> None:
    if max_bytes is not None and num_bytes > max_bytes:
        raise AdapterError(f"it takes {num_bytes} bytes, and {max_bytes} are left for it")


def _of_another_base(name: str, trained_on: str, base_model: str) -> str:
    return (
        f"adapter {name!r} says that it was trained on {trained_on!r}; the base model here is {base_model!r}"
    )


def _mark(path: str) -> str | None:
    with suppress(OSError):
        return fingerprint(path)
    return None
