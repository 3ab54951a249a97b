"""Files of object stores that fsspec's clients read: s3://, gs://."""

from collections.abc import Callable
from typing import Any

from toppings.sources.fetch import FetchError, Opened, Room, explained

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

    def look(self, name: str, room: Room) -> tuple[int | None, str] | None:
        """Size, and what is another one when the content is. None: there is no such file."""
        path = f"{self._root}/{name}"
        with explained(f"{self._address}/{name}"):
            try:
                info = self._call(self._system._info, room, name, path)
            except FileNotFoundError:
                return None
        if info.get("type", "file") != "file":
            return None
        mark = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("updated")
        size = info.get("size")
        return size if isinstance(size, int) else None, str(mark or "")

    def open(self, name: str, room: Room, start: int = 0) -> Opened:
        found = self.look(name, room)
        if found is None or found[0] is None:
            raise FetchError(f"{self._address}/{name} is there no longer")
        size = found[0]

        def read(begin: int) -> bytes:
            if begin >= size:
                if self.look(name, room) != found:
                    raise FetchError(f"{self._address}/{name} has changed while it was read")
                return b""
            path, end = f"{self._root}/{name}", min(begin + BLOCK_BYTES, size)
            block: bytes = self._call(self._system._cat_file, room, name, path, start=begin, end=end)
            return block

        return Opened(_Blocks(read, start), start, size)

    def _call(self, function: Any, room: Room, name: str, *args: Any, **options: Any) -> Any:
        """One of the client's own coroutines, which is given up when its time is over."""
        from fsspec.asyn import sync

        timeout = min(WAIT_S, room.left_s(f"{self._address}/{name}"))
        return sync(self._system.loop, function, *args, timeout=timeout, **options)


class _Blocks:
    """A file a block at a time, however little is asked for."""

    def __init__(self, read: Callable[[int], bytes], start: int) -> None:
        self._read, self._at = read, start

    def read(self, _: int) -> bytes:
        block = self._read(self._at)
        self._at += len(block)
        return block

    def close(self) -> None: ...
