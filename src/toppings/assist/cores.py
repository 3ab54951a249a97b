"""Which cores the workers get: those that the base model leaves free, or else shared ones."""

import os
from dataclasses import dataclass

MAX_DEFAULT_WORKERS = 16
"""A prompt that the CPU is worth asking for has rows for no more (pricing.MIN_ROWS_PER_WORKER)."""


@dataclass(frozen=True)
class WorkerCores:
    """One worker on each of `cores`; `is_shared`: the base model's threads run there too."""

    cores: tuple[int, ...]
    is_shared: bool

    def __str__(self) -> str:
        names = ", ".join(map(str, self.cores))
        how = "shared with the base model" if self.is_shared else "free of the base model"
        return f"{len(self.cores)} LoRA worker{'s' * (len(self.cores) != 1)} on core {names}, {how}"


def available_cores() -> tuple[int, ...]:
    """The cores that this process may run on."""
    return tuple(sorted(os.sched_getaffinity(0)))


def choose_cores(
    available: tuple[int, ...], num_base_threads: int, *, num_workers: int = 0, cores: tuple[int, ...] = ()
) -> WorkerCores:
    """`cores` if given, else the last `num_workers` of `available` (0: those that the base model's threads
    leave free, at most `MAX_DEFAULT_WORKERS`, and where they leave none, one shared core).

    Raises ValueError for a core that is not available or more workers than cores.
    """
    num_free = max(0, len(available) - num_base_threads)
    if not cores:
        wanted = num_workers or min(num_free, MAX_DEFAULT_WORKERS) or 1
        if wanted > len(available):
            raise ValueError(f"{wanted} workers asked for; only {len(available)} cores are available")
        cores = available[len(available) - wanted :]
    unknown = sorted(set(cores) - set(available))
    if unknown or len(set(cores)) != len(cores):
        raise ValueError(f"worker cores are {list(cores)}; choose distinct ones of {list(available)}")
    if num_workers and num_workers != len(cores):
        raise ValueError(f"{num_workers} workers and {len(cores)} cores; there must be one core for each")
    return WorkerCores(cores, is_shared=len(cores) > num_free)
