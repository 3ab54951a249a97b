"""Ranks and sizes of adapters by name: from a Toppings server's list, or from the files of a PEFT adapter."""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from toppings.cluster.router.cards import read_slices

MAX_KNOWN = 200_000
MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """`rank`: what it counts for in a step."""

    rank: int
    num_bytes: int = 0


class _Listed(msgspec.Struct):
    """An entry of `/adapters`."""

    name: str
    rank: int = 0
    step_rank: int = 0
    path: str = ""
    bytes: int = 0


class _List(msgspec.Struct):
    adapters: list[msgspec.Raw]


class AdapterDirectory:
    """What is known of each adapter; the last word on a name counts."""

    def __init__(self, default_rank: int) -> None:
        self._default = AdapterInfo(default_rank)
        self._known: dict[str, AdapterInfo] = {}
        self._read_from: dict[str, str] = {}

    def get(self, name: str) -> AdapterInfo:
        """The adapter's own, or the default rank where nobody told."""
        return self._known.get(name, self._default)

    def learn(self, name: str, info: AdapterInfo) -> None:
        if len(self._known) >= MAX_KNOWN and name not in self._known:
            self._known.clear()
        self._known[name] = info

    async def learn_list(self, body: bytes) -> None:
        """From `/adapters`: objects with `name`, `path`, `rank`, `step_rank` and `bytes`, bare or under
        `adapters`.

        Raises ValueError; entries that are none are passed over.
        """
        listed = msgspec.json.decode(body, type=_List | list[msgspec.Raw])
        raws = listed.adapters if isinstance(listed, _List) else listed
        for _, entry in await read_slices(raws, _Listed):
            if entry.rank > 0:
                for key in {entry.name, entry.path} - {""}:
                    self.learn(key, AdapterInfo(max(entry.step_rank, 0) or entry.rank, entry.bytes))

    async def learn_paths(self, paths: Iterable[tuple[str, str]], *, again: bool = False) -> None:
        """From `adapter_config.json` in each name's directory, where this machine sees it.

        Each is read once, unless its path changes or `again` says so.
        """
        wanted = {name: path for name, path in paths if again or self._read_from.get(name) != path}
        if not wanted:
            return
        found = await asyncio.to_thread(lambda: {n: read_adapter_info(Path(p)) for n, p in wanted.items()})
        if len(self._read_from) >= MAX_KNOWN:
            self._read_from.clear()
        self._read_from |= wanted
        for name, info in found.items():
            if info is not None:
                self.learn(name, info)


def read_adapter_info(path: Path) -> AdapterInfo | None:
    """The largest rank of a PEFT adapter, and its weights' bytes; None where there is no readable one."""
    file, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    try:
        if not file.is_file() or file.stat().st_size > MAX_CONFIG_BYTES:
            return None
        config = json.loads(file.read_text())
        rank = max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 0)
        return AdapterInfo(rank, weights.stat().st_size if weights.is_file() else 0) if rank else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
