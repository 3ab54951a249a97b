"""Files of object stores that fsspec's clients read: s3://, gs://."""

from collections.abc import Callable
from typing import Any

from toppings.sources.fetch import (
    DENIALS,
    FetchChanged,
    FetchDenied,
    FetchError,
    Look,
    Opened,
    Room,
    explained,
)

WAIT_S = 60.0
"""The longest wait for what a store has of a name, and for a block."""
BLOCK_BYTES = 8 << 20


class StorePlace:
    """What a store has below `address`, asked for by name."""

    def __init__(self, address: str) -> None:
        """Raises FetchError where there is no client, or it cannot be made."""
        self._address = address
        with explained(address):
            try:
                from fsspec.core import url_to_fs

                self._system, self._root = url_to_fs(address)
            except ImportError as error:
                raise FetchError(
                    f"{address.partition('://')[0]}:// needs more packages ({error}); "
                    "install them with: pip install 'toppings[remote]'"
                ) from error

    def look(self, name: str, room: Room) -> Look | None:
        """None: there is no such file. Raises FetchError, FetchDenied."""
        path = f"{self._root}/{name}"
        with explained(f"{self._address}/{name}"):
            try:
                info = self._call(self._system._info, room, name, path)
            except FileNotFoundError:
                return None
            except Exception as error:
                if not _is_denial(error):
                    raise
                raise FetchDenied(
                    f"{self._address}/{name} is not there, or may not be read: {error}"
                ) from error
        if info.get("type", "file") != "file":
            return None
        mark = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("updated")
        size = info.get("size")
        return size if isinstance(size, int) else None, str(mark or "")

    def open(self, name: str, room: Room, found: Look, start: int = 0) -> Opened:
        """What was `found`. Raises FetchError, FetchChanged."""
        size = found[0]
        if size is None:
            raise FetchError(f"{self._address} does not tell the size of {name}")

        def check() -> None:
            if self.look(name, room) != found:
                raise FetchChanged(f"{self._address}/{name} has changed since it was looked for")

        def read(begin: int) -> bytes:
            if begin >= size:
                check()
                return b""
            path, end = f"{self._root}/{name}", min(begin + BLOCK_BYTES, size)
            block: bytes = self._call(self._system._cat_file, room, name, path, start=begin, end=end)
            return block

        check()
        return Opened(_Blocks(read, start), start, size)

    def _call(self, function: Any, room: Room, name: str, *args: Any, **options: Any) -> Any:
        """One of the client's own coroutines, which is given up when its time is over."""
        from fsspec.asyn import sync

        timeout = min(WAIT_S, room.left_s(f"{self._address}/{name}"))
        return sync(self._system.loop, function, *args, timeout=timeout, **options)


def _is_denial(error: Exception) -> bool:
    """As s3fs tells it, and gcsfs."""
    is_told = isinstance(error, OSError) and str(error).startswith("Forbidden")
    return isinstance(error, PermissionError) or is_told or getattr(error, "code", None) in DENIALS


class _Blocks:
    """A file a block at a time, however little is asked for."""

    def __init__(self, read: Callable[[int], bytes], start: int) -> None:
        self._read, self._at = read, start

    def read(self, _: int) -> bytes:
        block = self._read(self._at)
        self._at += len(block)
        return block

    def close(self) -> None: ...
