"""What an engine knows of a request beside what the scheduler does."""

import time
from dataclasses import dataclass, field, replace

from toppings.adapters.manager import AdapterManager
from toppings.core import BatchItem, Request
from toppings.engine.cold_notes import ColdNotes, ms
from toppings.engine.model_runner import StepResult
from toppings.engine.scoring import PromptNotes
from toppings.messages import ColdStart, RequestOutput


@dataclass(slots=True)
class Progress:
    """Instants are of `time.perf_counter`. `cold`: of a request whose adapter was not on the device."""

    request: Request
    tier: str  # where its adapter was on arrival: "device", "host" or "disk"
    first_scheduled_at: float | None = None
    prefill_s: float = 0.0  # its steps up to the first token
    load_wait_s: float = 0.0  # the part of them that waited for adapter loads
    notes: PromptNotes = field(default_factory=PromptNotes)
    cold: ColdNotes | None = None

    def __post_init__(self) -> None:
        if self.request.adapter_id is not None and self.tier != "device":
            self.cold = ColdNotes(self.request.arrived_at)

    def note_scheduled(self, now: float) -> None:
        if self.first_scheduled_at is None:
            self.first_scheduled_at = now

    def note_prefill(self, item: BatchItem, now: float, step_s: float, result: StepResult) -> None:
        """A step up to the first token has ended `now`."""
        self.prefill_s += step_s
        self.load_wait_s += result.load_wait_s
        if self.cold is not None:
            self.cold.note(item, now, step_s, result)

    def with_start(self, output: RequestOutput, adapters: AdapterManager) -> RequestOutput:
        """With what is told of the prompt and of the time until it was read."""
        request, num_top = self.request, self.request.sampling.prompt_logprobs
        return replace(
            output,
            queue_ms=self.queue_ms,
            cold_start=self.cold_start(adapters),
            num_cached_tokens=request.num_cached_tokens,
            prompt_logprobs=None if num_top is None else self.notes.logprobs(num_top),
            embedding=None if request.sampling.pooling is None else self.notes.embedding(),
        )

    @property
    def queue_ms(self) -> float:
        return ms((self.first_scheduled_at or 0.0) - self.request.arrived_at)

    def cold_start(self, adapters: AdapterManager) -> ColdStart | None:
        """What the request waited for, once its first token is there; None where it was warm."""
        request, cold = self.request, self.cold
        if request.adapter_id is None or cold is None:
            return None
        times = adapters.load_times(request.adapter_id)
        read_wait_s = 0.0
        if self.tier == "disk" and self.first_scheduled_at is not None:
            read_wait_s = max(0.0, min(times.host_ready_at, self.first_scheduled_at) - request.arrived_at)
        return ColdStart(
            tier=self.tier,
            read_ms=times.read_ms if self.tier == "disk" else 0.0,
            copy_ms=times.copy_ms,
            exposed_ms=ms(read_wait_s + self.load_wait_s),
            compute_ms=ms(self.prefill_s - self.load_wait_s),
            adapter_id=request.adapter_id,
            rank=adapters.rank_of(request.adapter_id),
            num_bytes=adapters.size_of(request.adapter_id),
            arrived_at=cold.arrived_at_unix,
            queue_ms=self.queue_ms,
            first_token_ms=ms(time.perf_counter() - request.arrived_at),
            read=cold.read(times) if self.tier == "disk" else None,
            layers=cold.layers(times, adapters.targeted_groups(request.adapter_id)),
            steps=cold.steps,
        )
