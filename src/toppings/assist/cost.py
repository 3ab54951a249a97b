"""What the pieces of a cold start cost on a machine: measured by profile.py, used by pricing.py and
plan.py."""

import json
import os
from bisect import bisect_right
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class CpuCost:
    """One core's time for a slice: ms = fixed + per_gflop·GFLOP + per_mweights·M weights read + per_mvalues·M
    values read and written; M is 10^6. Fitted by profile.py. Why linear: published rates of one core, 90
    to 600 GFLOP/s at ranks 8 to 256, are 1 / (a + b/rank) to 10 %."""

    fixed_ms: float
    per_gflop_ms: float
    per_mweights_ms: float
    per_mvalues_ms: float

    def ms(self, num_rows: int, rank: int, num_in: int, num_out: int) -> float:
        """x [rows, in] times A [rank, in], then B [rank, out]; `num_out` 0: the shrink alone."""
        coefficients = (self.fixed_ms, self.per_gflop_ms, self.per_mweights_ms, self.per_mvalues_ms)
        return sum(
            c * f for c, f in zip(coefficients, cpu_features(num_rows, rank, num_in, num_out), strict=True)
        )


def cpu_features(num_rows: int, rank: int, num_in: int, num_out: int) -> tuple[float, ...]:
    """(1, GFLOP, 10^6 weights, 10^6 values in and out) of one slice."""
    width = num_in + num_out
    return 1.0, 2e-9 * num_rows * rank * width, 1e-6 * rank * width, 1e-6 * num_rows * width


@dataclass(frozen=True, kw_only=True)
class CostProfile:
    """All times in ms, link speed in 10^9 bytes per second.

    `layer_ms`: (tokens, device time of one layer without LoRA), tokens ascending; linear in between and
    beyond. `gemm_share`: part of a layer's time in the base products of projections, with which a round trip
    overlaps; of a mixture (`has_experts`) those of attention. `round_trip_ms`: a projection group's round
    trip less the product itself. `session_ms`: waking the workers. `result_gbps`: link over which rows go out
    and results come back (0: shared memory, in `round_trip_ms`). `sharing_slowdown`: factor on the device's
    time while workers compute on the base model's cores. Where the host queues work for a device,
    `queue_layer_ms` is what it takes to queue a layer and `queue_piece_ms` one worker's share of a projection
    group, the way there and back; else 0.
    """

    origin: str
    link_gbps: float
    copy_ms: float
    cpu: CpuCost
    layer_ms: tuple[tuple[int, float], ...]
    gemm_share: float
    round_trip_ms: float
    session_ms: float
    num_workers: int
    result_gbps: float = 0.0
    sharing_slowdown: float = 1.0
    queue_layer_ms: float = 0.0
    queue_piece_ms: float = 0.0
    has_experts: bool = False

    def __post_init__(self) -> None:
        if not self.link_gbps > 0:
            raise ValueError(f"link_gbps is {self.link_gbps}; it must be above 0")
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}; it must be at least 0")
        if not self.layer_ms or list(self.layer_ms) != sorted(set(self.layer_ms)):
            raise ValueError(f"layer_ms is {self.layer_ms}; it must hold ascending token counts")

    def layer_time_ms(self, num_tokens: int) -> float:
        points = self.layer_ms
        if len(points) == 1:
            return points[0][1]
        i = min(max(bisect_right(points, (num_tokens, float("inf"))), 1), len(points) - 1)
        (t0, ms0), (t1, ms1) = points[i - 1], points[i]
        return max(min(ms0, ms1) * 0.5, ms0 + (ms1 - ms0) * (num_tokens - t0) / (t1 - t0))

    def load_tokens(self, num_bytes: int, num_layers: int) -> float:
        """Tokens of a long prompt that the device computes while an adapter travels, layer by layer."""
        num_tokens, layer_ms = self.layer_ms[-1]
        load_ms = num_layers * self.copy_ms + num_bytes / (self.link_gbps * 1e6)
        return load_ms * num_tokens / (layer_ms * num_layers) if layer_ms > 0 else 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "CostProfile":
        """Raises ValueError for a text that is no profile."""
        try:
            fields = json.loads(text)
            fields["cpu"] = CpuCost(**fields["cpu"])
            fields["layer_ms"] = tuple((int(t), float(ms)) for t, ms in fields["layer_ms"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a cold-start profile: {error}") from error

    @classmethod
    def read(cls, path: Path) -> "CostProfile":
        """Raises ValueError for a file that holds no profile."""
        try:
            return cls.from_json(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: {error}; remove the file, and it is measured anew") from error

    def write(self, path: Path) -> None:
        """Whoever reads meanwhile, or after a crash, finds the old file or the new one, whole.

        Raises OSError.
        """
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            draft.write_text(self.to_json())
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise
