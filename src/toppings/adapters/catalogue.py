"""The adapters that are registered: found by name and id, pinned, removed, read.

live ----> remove (or a reload) ---- removed ----> purge
found by name and id                 found by id only: requests that hold the id still run
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from toppings.adapters.base_weights import BaseWeights
from toppings.adapters.capacity import Capacity
from toppings.adapters.errors import AdapterError, AdapterNotFound
from toppings.adapters.latest import Latest
from toppings.adapters.layout import DTYPE_BYTES, BaseShapes
from toppings.adapters.merges import Merge
from toppings.adapters.merging import MergePlan
from toppings.adapters.packed import PackedAdapter, PackedFileError
from toppings.adapters.packed_dir import PackedCandidate, PackedDir
from toppings.adapters.records import AdapterRecord, Records
from toppings.adapters.rows import AdapterRows, Ids
from toppings.adapters.state_lock import StateLock

logger = logging.getLogger(__name__)

PACKED = "packed"
MAX_TOLD = 1024  # adapters whose lost file is remembered as told


class AdapterCatalogue:
    """The adapters of one base model and dtype, kept in `state_dir`.

    With an exclusive `lock` it is the directory's only writer: records are kept in memory, and no look-up
    waits for the disk. Otherwise any number of threads and processes may use it at once. `base_model` is the
    name the base model goes by in requests, `base_names` others it is known by to adapters' configurations;
    with `is_strict`, those that name another one are refused. `identity` is that of its weights. `capacity`
    bounds what is registered; None: nothing does. `weights`: the base model's, for adapters that are told
    relative to them; without, these are refused.

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
        weights: BaseWeights | None = None,
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
        self._packed_dir = PackedDir(self.state_dir / PACKED, shapes, dtype, weights)
        self._rows = AdapterRows(self.state_dir, self.state_dir / PACKED)
        self._rows.check_base({**asdict(shapes), "dtype": dtype, "identity": identity})
        if self._is_only_writer:
            self._rows.keep_in_memory()

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
        if not record.is_made_here:
            raise AdapterError(
                f"the packed file of adapter {record.name!r} is damaged, and it came from {record.path}; "
                "pull or load it again"
            )
        if record.merge is not None:
            candidate = self._merge_again(record, record.merge)
        else:
            candidate = self._packed_dir.pack(record.path, is_synced=True)
        if candidate.header.digest != record.digest:
            candidate.discard()
            raise AdapterError(
                f"the packed file of adapter {record.name!r} is damaged, and {record.path} has changed since "
                "it was registered; register it again"
            )
        self._packed_dir.adopt(candidate, adapter_id)

    def _merge_again(self, record: AdapterRecord, merge: Merge) -> PackedCandidate:
        parts = [self.find(part.name, part.digest) for part in merge.parts]
        for part, found in zip(merge.parts, parts, strict=True):
            if found is None:
                raise AdapterError(
                    f"the packed file of adapter {record.name!r} is damaged, and adapter {part.name!r}, of "
                    "which it was merged, is not registered any more as it was; merge it again"
                )
        with self._planned(merge, [part for part in parts if part is not None]) as plan:
            return self._packed_dir.merge(plan, record.trained_on)

    @contextmanager
    def _planned(self, merge: Merge, parts: Sequence[AdapterRecord]) -> Iterator[MergePlan]:
        """With the parts' packed files open. Raises AdapterError where they cannot be merged."""
        with ExitStack() as stack:
            opened = [(each, stack.enter_context(self.open_packed(each.adapter_id))) for each in parts]
            yield MergePlan(merge, opened, self.shapes, self.dtype)
