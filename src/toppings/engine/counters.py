"""What an engine counts of its steps, from its start on."""

from toppings.engine.model_runner import StepResult
from toppings.engine.step import Step

COUNTERS = (
    *("steps", "prompt_tokens", "generation_tokens", "step_errors"),
    *("assist_cpu_products", "assist_cold_products"),
)


class Counters:
    def __init__(self) -> None:
        self.values = dict.fromkeys(COUNTERS, 0)

    def note_step(self, step: Step, result: StepResult, num_outputs: int) -> None:
        """It has ended, and drew `num_outputs` tokens for requests that had not."""
        values = self.values
        values["steps"] += 1
        values["generation_tokens"] += num_outputs
        values["prompt_tokens"] += step.num_prompt_tokens
        if result.assist is not None:
            values["assist_cpu_products"] += result.assist.num_cpu_products
            values["assist_cold_products"] += result.assist.num_cold_products

    def note_error(self) -> None:
        """A step failed."""
        self.values["step_errors"] += 1
