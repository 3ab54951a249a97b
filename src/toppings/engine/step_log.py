"""One JSON record per engine step, for `toppings report` and for whoever wants to know what a step did."""

from collections.abc import Callable

from toppings.core import Batch
from toppings.engine.cold_notes import ms
from toppings.engine.model_runner import StepResult
from toppings.log_files import JsonLines


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


class StepLog(JsonLines):
    """A record for each step."""

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
