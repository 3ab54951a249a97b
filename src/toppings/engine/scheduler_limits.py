"""What a scheduler is held to, and requests that can never be served within it."""

import math
from dataclasses import dataclass

from toppings.bad_input import RequestError
from toppings.core import BATCH_PRIORITY, Request

FIXED_STEP_TOKENS = {"cuda": 256, "cpu": 32}
"""A token of a prompt takes two operations for each parameter of two bytes: as many tokens as a device has
operations a byte that it reads (some 200 to 300 on GPUs in 16 bits, 10 to 20 on two cores)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """`max_adapter_wait_s`: after waiting so long for its adapter's room, a request has others drained.
    `scheduling_policy`: as in `config.SCHEDULING_POLICIES`. `fixed_step_tokens`: of a prompt, whose products
    take as long as what a step takes in any case, above all reading the weights; `FIXED_STEP_TOKENS` has them
    for devices of today."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_adapter_wait_s: float
    scheduling_policy: str = "fair"
    fixed_step_tokens: int = FIXED_STEP_TOKENS["cuda"]

    def max_draft_len(self, request: Request) -> int:
        """How many tokens may be guessed, so that one more can follow."""
        num_output = request.sampling.max_tokens - len(request.output_token_ids)
        return min(num_output, self.max_model_len - request.num_tokens) - 1

    def check(self, request: Request) -> None:
        """Raises RequestError where it can never fit, or stands as nobody may."""
        num_prompt, limit = len(request.prompt_token_ids), self.max_model_len
        if not num_prompt:
            raise RequestError("the prompt is empty; it needs at least one token")
        most = limit - min(1, request.sampling.max_tokens)
        if num_prompt > most:
            raise RequestError(
                f"the prompt has {num_prompt} tokens; at most {most} fit max_model_len {limit}"
            )
        if not 0 < request.weight < math.inf:
            raise RequestError(f"weight is {request.weight}; it must be above 0 and finite")
        priority = request.priority - BATCH_PRIORITY * request.is_batch
        if priority and self.scheduling_policy != "priority":
            raise RequestError(
                f"priority is {priority}, but scheduling_policy is {self.scheduling_policy!r};"
                " leave it out, or serve with scheduling_policy priority"
            )
