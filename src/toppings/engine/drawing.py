"""The next tokens of logits on a GPU: one copy there, one back, and the host waits for that one alone."""

from typing import Any

from torch import Tensor

from toppings.engine.staging import Staging
from toppings.ops.device_sampling import SamplingPlan, draw, to_output
from toppings.ops.sampling import SampleOutput, SamplingRow


class DeviceSampler:
    """Called as `ops.sampling.sample`, draws the same tokens. `cuda`: the `torch.cuda` module, or a fake."""

    def __init__(self, staging: Staging, cuda: Any) -> None:
        self._staging = staging
        self._cuda = cuda

    def __call__(self, logits: Tensor, rows: list[SamplingRow]) -> SampleOutput:
        if not rows:
            return SampleOutput([])
        plan = SamplingPlan.of(rows, logits.shape[1])
        drawn = draw(logits, plan, self._staging.bring(plan.arrays))
        on_host = [part.to("cpu", non_blocking=True) for part in drawn]  # into page-locked memory
        copied = self._cuda.Event()
        copied.record()
        copied.synchronize()
        return to_output(plan, rows, on_host)
