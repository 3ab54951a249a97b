"""The directory of packed files, one per adapter id."""

import errno
import os
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from toppings.adapters.base_weights import BaseWeights
from toppings.adapters.checkpoint import read_checkpoint
from toppings.adapters.errors import AdapterError, StateError, StateFullError
from toppings.adapters.layout import BaseShapes
from toppings.adapters.merges import Merge
from toppings.adapters.merging import MergePlan
from toppings.adapters.packed import (
    PackedAdapter,
    PackedFileError,
    PackedHeader,
    pack_adapter,
    write_packed,
)
from toppings.adapters.vocabulary import Vocabulary


@dataclass(frozen=True)
class PackedCandidate:
    """A packed file under a temporary name, to be given an id or discarded, and what its record will say."""

    header: PackedHeader
    temp_file: Path
    path: str
    trained_on: str = ""
    invocation_tokens: tuple[int, ...] = ()
    vocabulary: Vocabulary | None = None
    merge: Merge | None = None

    def discard(self) -> None:
        with suppress(OSError):  # the next start's clean-up finds it
            self.temp_file.unlink(missing_ok=True)


class PackedDir:
    """Makes, opens and deletes the packed files of adapters for one base model and dtype."""

    def __init__(
        self, directory: Path, shapes: BaseShapes, dtype: str, base: BaseWeights | None = None
    ) -> None:
        self.shapes = shapes
        self.dtype = dtype
        self._base = base
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _state_error(f"cannot use the directory of packed adapters {directory}", error) from error

    def file(self, adapter_id: int) -> Path:
        return self._directory / f"{adapter_id}.pack"

    def pack(
        self, path: str | Path, *, is_synced: bool, roots: Sequence[Path] | None = None
    ) -> PackedCandidate:
        """Packs the PEFT checkpoint in `path`; `is_synced`: flushed to the disk; `roots`: where its files may
        lie (None: anywhere).

        Raises AdapterError with the reason, StateError where no file can be written; none is left then.
        """
        try:
            checkpoint = read_checkpoint(path, self.shapes, roots, self._base)
        except OSError as error:
            raise AdapterError(f"cannot read adapter {path}: {error.strerror}") from error
        header, temp_file = self._write(
            lambda file: pack_adapter(checkpoint, self.dtype, file, is_synced=is_synced)
        )
        return PackedCandidate(
            header,
            temp_file,
            str(checkpoint.path),
            checkpoint.base_model,
            checkpoint.invocation_tokens,
            checkpoint.vocabulary,
        )

    def merge(self, plan: MergePlan, trained_on: str) -> PackedCandidate:
        """Raises as `pack`."""
        header, temp_file = self._write(
            lambda file: write_packed(plan.header, plan.blocks(), file, is_synced=True)
        )
        return PackedCandidate(header, temp_file, plan.merge.path, trained_on, merge=plan.merge)

    def _write(self, write: Callable[[Path], PackedHeader]) -> tuple[PackedHeader, Path]:
        """Into a file of a temporary name."""
        temp_file = self._directory / f"{os.getpid()}-{uuid.uuid4().hex}.tmp"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)  # it may be gone, as whatever is in it
            return write(temp_file), temp_file
        except BaseException as error:
            with suppress(OSError):
                temp_file.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise _state_error("cannot write the packed adapter", error) from error
            raise

    def digest_of(self, path: str | Path) -> str:
        """Of the PEFT checkpoint in `path`. Raises AdapterError where it cannot be served."""
        return read_checkpoint(path, self.shapes, base=self._base).digest

    def adopt(self, candidate: PackedCandidate, adapter_id: int) -> None:
        """Gives the candidate its place, atomically. Raises StateError; the candidate is gone then."""
        try:
            os.replace(candidate.temp_file, self.file(adapter_id))
        except OSError as error:
            candidate.discard()
            raise _state_error(f"cannot keep the packed file {self.file(adapter_id)}", error) from error

    def open(self, adapter_id: int, digest: str) -> PackedAdapter:
        """Raises PackedFileError where the file is missing, damaged, or of another digest."""
        packed = PackedAdapter.open(self.file(adapter_id))
        layout = packed.layout
        if (packed.header.digest, layout.shapes, layout.dtype) != (digest, self.shapes, self.dtype):
            packed.close()
            raise PackedFileError(f"packed adapter {self.file(adapter_id)} is of another adapter")
        return packed

    def delete(self, adapter_id: int) -> None:
        """Raises StateError."""
        try:
            self.file(adapter_id).unlink(missing_ok=True)
        except OSError as error:
            raise _state_error(f"cannot delete the packed file {self.file(adapter_id)}", error) from error

    def delete_all_but(self, adapter_ids: set[int], *, are_others_writing: bool) -> None:
        """Also deletes temporary files; where others may be writing, but for those of processes that live: in
        a container a number of an earlier process is soon another's."""
        wanted = {self.file(adapter_id).name for adapter_id in adapter_ids}
        for entry in os.scandir(self._directory):
            if entry.name not in wanted and not (are_others_writing and _is_being_written(entry.name)):
                with suppress(OSError):  # it only takes room
                    os.unlink(entry.path)


def _state_error(message: str, error: OSError) -> StateError:
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return (StateFullError if is_full else StateError)(f"{message}: {error.strerror}")


def _is_being_written(file_name: str) -> bool:
    pid, _, rest = file_name.partition("-")
    if not rest.endswith(".tmp") or not pid.isdigit():
        return False
    with suppress(PermissionError):  # somebody else's process, which lives
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
    return True
