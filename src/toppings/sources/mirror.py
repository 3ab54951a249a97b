"""Base models from an address, mirrored in a directory of this machine; what was interrupted goes on."""

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import IO

from toppings.sources.checkpoint_files import CONFIG, INDEX, SINGLE, TEXTS, weights_of
from toppings.sources.fetch import (
    FetchError,
    FetchNotFound,
    FetchSpoilt,
    Opened,
    Room,
    copy,
    sync_directory,
    sync_file,
)
from toppings.sources.remote import MAX_UNTOLD_BYTES, RemoteFiles

SYNC_BYTES = 16 << 20
"""After so many bytes what there is of a file goes to the disk; no chunk is longer."""
PART = ".part"


def fetch_model(address: str, cache: Path) -> Path:
    """A base model's files below `cache`, or a `.gguf` file.

    No other process may do so at once. Raises FetchError, OSError.
    """
    if address.endswith(".gguf"):
        parent, _, name = address.rpartition("/")
        return _Mirror(RemoteFiles(parent, [name], {name}), cache).whole() / name
    texts = RemoteFiles(address, TEXTS, {CONFIG})
    if CONFIG not in texts.sizes():
        raise FetchError(f"{address} is no base model: it has no {CONFIG}")
    shards = _shards(texts, cache) if INDEX in texts.sizes() else [SINGLE]
    files = RemoteFiles(address, texts.sizes(), {CONFIG, *shards})
    if missing := set(shards) - set(files.sizes()):
        raise FetchNotFound(
            f"{address} is no base model: it has no {min(missing)}; only safetensors are read, never pickles"
        )
    return _Mirror(files, cache).whole()


def _shards(texts: RemoteFiles, cache: Path) -> Iterable[str]:
    mirror = _Mirror(texts, cache)
    try:
        mirror.bring(INDEX)
        return weights_of(mirror.part, texts.where)
    finally:
        mirror.drop()


class _Mirror:
    """A directory of the content of `files`, named as the address's last part; `part` is one under way."""

    def __init__(self, files: RemoteFiles, cache: Path) -> None:
        self._files = files
        self._cache, self._address = cache, _hash(files.where)
        key = f"{self._address}-{_hash(files.version)}"
        name = files.where.rpartition("/")[2]
        self._done = cache / key / name
        self.part = cache / key / f".{name}{PART}"

    def whole(self) -> Path:
        if self._done.is_dir():
            return self._done
        # Here, since an engine alone runs without it.
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        is_shown = sys.stderr is not None and sys.stderr.isatty()
        with Progress(*columns, console=Console(stderr=True), disable=not is_shown) as progress:
            for name, size in self._files.sizes().items():
                task = progress.add_task(name, total=size)
                self.bring(name, lambda n, task=task: progress.update(task, completed=n))  # type: ignore[misc]
        sync_directory(self.part)
        self.part.rename(self._done)
        sync_directory(self._done.parent)
        self._drop_others()
        return self._done

    def _drop_others(self) -> None:
        """Of the same address: parts, and all revisions but the one before, which a server may be serving."""
        others = [path for path in self._cache.glob(f"{self._address}-*/") if path != self._done.parent]
        whole = [path for path in others if (path / self._done.name).is_dir()]
        before = max(whole, key=lambda path: path.stat().st_mtime_ns, default=None)
        for path in others:
            if path != before:
                shutil.rmtree(path, ignore_errors=True)

    def bring(self, name: str, on_progress: Callable[[int], None] = lambda _: None) -> None:
        """A file has its name once it is whole and on the disk. What there is of one under way is believed
        but for its end, which a power cut may have damaged."""
        self.part.mkdir(parents=True, exist_ok=True)
        target, part = self.part / name, self.part / f"{name}{PART}"
        if target.exists():
            return
        what, size = f"{self._files.where}/{name}", self._files.sizes()[name]
        room = Room(shutil.disk_usage(self.part).free)
        start = max(0, part.stat().st_size - 2 * SYNC_BYTES) if part.exists() else 0
        room.check({name: None if size is None else size - start}, what)
        opened = self._files.open(name, room, start)
        size = opened.size if size is None else size
        if size is None:
            room.max_bytes = min(room.max_bytes, MAX_UNTOLD_BYTES)
        try:
            with closing(opened.body), part.open("r+b" if opened.start else "wb") as out:
                _go_on(out, opened, room, what, size, on_progress)
        except FetchSpoilt:
            part.unlink()
            raise
        part.rename(target)

    def drop(self) -> None:
        shutil.rmtree(self.part.parent, ignore_errors=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _go_on(
    out: IO[bytes],
    opened: Opened,
    room: Room,
    what: str,
    size: int | None,
    on_progress: Callable[[int], None],
) -> None:
    out.truncate(opened.start)
    out.seek(opened.start)
    synced = opened.start

    def note(num_bytes: int) -> None:
        nonlocal synced
        if num_bytes - synced >= SYNC_BYTES:
            sync_file(out)
            synced = num_bytes
        on_progress(num_bytes)

    copy(opened, out, room, what, size=size, on_chunk=note)
    sync_file(out)
