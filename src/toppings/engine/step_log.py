"""One JSON record per engine step, for `toppings report` and for whoever wants to know what a step did."""

import json
from pathlib import Path
from typing import TextIO

from toppings.core import Batch


def batch_kind(batch: Batch) -> str:
    """ "decode", "prefill" or "mixed"."""
    num_decodes = sum(item.is_decode for item in batch.items)
    return "decode" if num_decodes == len(batch.items) else "mixed" if num_decodes else "prefill"


class StepLog:
    """Appends to a file, line by line; with an empty path it writes nothing."""

    def __init__(self, path: str) -> None:
        self._file: TextIO | None = None
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the engine

    def write(self, record: dict[str, object]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
