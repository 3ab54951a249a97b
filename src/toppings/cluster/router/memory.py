"""What the fleet should have: the adapters loaded and unloaded through the router, on disk too if asked."""

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Entry:
    """What the fleet should have under a name: the load request's body, or None where it was unloaded.

    No two entries ever have the same version.
    """

    version: int
    body: dict[str, Any] | None


class AdapterMemory:
    """Entries by name; `state_file` keeps them over a restart where it is not empty.

    Raises ValueError where that file is there and cannot be read.
    """

    def __init__(self, state_file: str) -> None:
        self._file = Path(state_file) if state_file else None
        self._writing = asyncio.Lock()
        self._entries = self._read()
        self._last_version = max((entry.version for entry in self._entries.values()), default=0)
        self._has_changed = False

    def names(self) -> list[str]:
        return list(self._entries)

    def get(self, name: str) -> Entry | None:
        return self._entries.get(name)

    async def note(self, name: str, body: dict[str, Any] | None) -> int:
        """The entry's version. Of a file that cannot be written the log tells: the change is done."""
        self._last_version += 1
        self._entries[name] = Entry(version := self._last_version, body)
        await self._write()
        return version

    async def drop(self, name: str) -> None:
        """Nobody needs to be told of this name any more."""
        del self._entries[name]
        await self._write()

    async def _write(self) -> None:
        """Changes that come while a file is written are written together."""
        self._has_changed = True
        async with self._writing:  # the last one to write has the last word
            if self._file is None or not self._has_changed:
                return
            self._has_changed = False
            text = msgspec.json.encode(self._entries)
            try:
                await asyncio.to_thread(_replace, self._file, text)
            except OSError as error:
                logger.error("state_file %s is not written (%s): a restart would forget", self._file, error)

    def _read(self) -> dict[str, Entry]:
        if self._file is None or not self._file.exists():
            return {}
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=dict[str, Entry])
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"state_file {self._file} cannot be read: {error}; move it away") from error


def _replace(file: Path, text: bytes) -> None:
    part = file.with_suffix(".part")
    part.write_bytes(text)
    os.replace(part, file)
