"""One JSON record per engine step, for `toppings report` and for whoever wants to know what a step did."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from toppings.core import Batch
from toppings.engine.model_runner import StepResult
from toppings.engine.progress import ms


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
    """Appends to a file, line by line; with an empty path it writes nothing."""

    def __init__(self, path: str) -> None:
        self._file: TextIO | None = None
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the engine

    def write(self, record: dict[str, object]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")

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
            self._file.close()
