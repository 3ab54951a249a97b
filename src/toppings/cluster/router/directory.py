"""Ranks and sizes of adapters by name: from a Toppings server's list, or from the files of a PEFT adapter."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    rank: int
    num_bytes: int = 0


class AdapterDirectory:
    """What is known of each adapter; the last word on a name counts."""

    def __init__(self, default_rank: int) -> None:
        self._default = AdapterInfo(default_rank)
        self._known: dict[str, AdapterInfo] = {}

    def get(self, name: str) -> AdapterInfo:
        """The adapter's own, or the default rank where nobody told."""
        return self._known.get(name, self._default)

    def learn(self, name: str, info: AdapterInfo) -> None:
        self._known[name] = info

    def learn_list(self, listed: Any) -> None:
        """From `/adapters`: objects with `name`, `path`, `rank` and `bytes`, bare or under `adapters`."""
        entries = listed.get("adapters", []) if isinstance(listed, dict) else listed
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("rank"), int):
                info = AdapterInfo(entry["rank"], int(entry.get("bytes") or 0))
                for key in {str(entry.get("name")), str(entry.get("path"))}:
                    self._known[key] = info

    def learn_path(self, name: str, path: str) -> None:
        """From `adapter_config.json` in a directory, where this machine sees it."""
        info = read_adapter_info(Path(path))
        if info is not None:
            self._known[name] = info


def read_adapter_info(path: Path) -> AdapterInfo | None:
    """The largest rank of a PEFT adapter, and its weights' bytes; None where there is no readable one."""
    try:
        config = json.loads((path / "adapter_config.json").read_text())
        ranks = [int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    weights = path / "adapter_model.safetensors"
    return AdapterInfo(max(ranks), weights.stat().st_size if weights.is_file() else 0)
