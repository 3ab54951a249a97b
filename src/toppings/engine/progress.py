"""What an engine knows of a request beside what the scheduler does."""

from dataclasses import dataclass, field

from toppings.adapters.manager import AdapterManager
from toppings.core import Request
from toppings.engine.scoring import PromptNotes
from toppings.messages import ColdStart


@dataclass(slots=True)
class Progress:
    """Instants are of `time.perf_counter`."""

    request: Request
    tier: str  # where its adapter was on arrival: "device", "host" or "disk"
    first_scheduled_at: float | None = None
    prefill_s: float = 0.0  # its steps up to the first token
    load_wait_s: float = 0.0  # the part of them that waited for adapter loads
    notes: PromptNotes = field(default_factory=PromptNotes)

    def cold_start(self, adapters: AdapterManager) -> ColdStart | None:
        """What the request waited for, once its first token is there; None where it was warm."""
        request = self.request
        if request.adapter_id is None or self.tier == "device":
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
        )


def ms(seconds: float) -> float:
    return seconds * 1e3
