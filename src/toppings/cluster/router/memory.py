"""What the fleet should have: the adapters loaded and unloaded through the router, on disk too if asked."""

import asyncio
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Entry:
    """What the fleet should have under a name: the load request's body, or None where it was unloaded."""

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

    def names(self) -> list[str]:
        return list(self._entries)

    def get(self, name: str) -> Entry | None:
        return self._entries.get(name)

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        return iter(self._entries.items())

    async def note(self, name: str, body: dict[str, Any] | None) -> int:
        """The entry's version. Of a file that cannot be written the log tells: the change is done."""
        before = self._entries.get(name)
        version = before.version + 1 if before else 1
        self._entries[name] = Entry(version, body)
        await self._write()
        return version

    async def _write(self) -> None:
        if self._file is None:
            return
        async with self._writing:  # the last one to write has the last word
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
