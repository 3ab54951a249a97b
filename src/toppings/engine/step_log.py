"""One JSON record per engine step, for `toppings report` and for whoever wants to know what a step did."""

import json
import queue
from collections.abc import Callable
from contextlib import suppress

from toppings.config import OFF
from toppings.core import Batch
from toppings.engine.cold_notes import ms
from toppings.engine.model_runner import StepResult
from toppings.log_files import RotatingFile
from toppings.vital import VitalThread

MAX_QUEUED_RECORDS = 4096
LINGER_S = 2.0
"""How long the last records may take to reach the file at the end."""


def batch_kind(batch: Batch) -> str:
    """ "decode", "prefill" or "mixed"."""
    num_decodes = sum(item.is_decode for item in batch.items)
    return "decode" if num_decodes == len(batch.items) else "mixed" if num_decodes else "prefill"


def describe(batch: Batch, rank_of: Callable[[int], int]) -> dict[str, object]:
    """What a record says of the step's batch; to be asked before the batch is committed."""
    requests = [item.request for item in batch.items]
    adapters = dict.fromkeys(r.adapter_id for r in requests if r.adapter_id is not None)
    return {
        "kind": batch_kind(batch),
        "requests": len(requests),
        "tokens": batch.num_tokens,
        "adapters": len(adapters),
        "ranks": [rank_of(adapter_id) for adapter_id in adapters],
    }


def _assist_fields(result: StepResult) -> dict[str, object]:
    """Of a step with cold adapters: products (adapter, layer, projection group) that the CPU computed, and
    the time that the device waited for them."""
    assist = result.assist
    if assist is None:
        return {}
    return {
        "cpu_layers": assist.num_cpu_products,
        "num_layers": assist.num_cold_products,
        "worker_wait_ms": round(ms(assist.worker_wait_s), 3),
    }


class StepLog:
    """Appends to a file, line by line, by a thread of its own: no disk holds up a step.

    Writes nothing with an empty path or "off". A record that cannot be written, or comes while too many wait
    for a slow disk, is dropped and counted.
    """

    def __init__(self, path: str, max_bytes: int = 0) -> None:
        self._queue: queue.Queue[dict[str, object] | None] = queue.Queue(MAX_QUEUED_RECORDS)
        self._num_overrun = 0
        self._file: RotatingFile | None = None
        if path and path != OFF:
            self._file = RotatingFile(path, max_bytes)
            self._thread = VitalThread(self._run, "step-log")
            self._thread.start()

    @property
    def num_dropped(self) -> int:
        return self._num_overrun + (0 if self._file is None else self._file.num_dropped)

    def write(self, record: dict[str, object]) -> None:
        """Takes the record, which must not change any more."""
        if self._file is not None:
            try:
                self._queue.put_nowait(record)
            except queue.Full:
                self._num_overrun += 1

    def write_step(self, batch: dict[str, object], result: StepResult, step_s: float) -> None:
        """`batch`: as `describe` says."""
        self.write(
            {
                **batch,
                "ms": round(ms(step_s), 3),
                "load_ms": round(ms(result.load_wait_s), 3),
                "overlapped_load_ms": round(max(0.0, result.copy_ms - ms(result.load_wait_s)), 3),
                **_assist_fields(result),
            }
        )

    def close(self) -> None:
        if self._file is not None:
            with suppress(queue.Full):
                self._queue.put(None, timeout=LINGER_S)
                self._thread.join(LINGER_S)
            self._file = None

    def _run(self) -> None:
        file = self._file
        assert file is not None
        file.append(b"")  # it is there from the start
        while (record := self._queue.get()) is not None:
            try:
                line = json.dumps(record)
            except (TypeError, ValueError):
                self._num_overrun += 1
                continue
            file.append(line.encode() + b"\n")
        file.close()
