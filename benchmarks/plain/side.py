"""One side of `plain_cost.py`: an engine of whichever tree is on the path, asked line by line for a load.

    python side.py MODEL ADAPTER STATE_DIR

Each line of standard input is a load as JSON (`Load` in plain_cost.py); the answer is what it took of this
process: processor seconds, and instructions in user mode where the kernel counts them (else null).
"""

import ctypes
import json
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

from toppings.config import EngineConfig
from toppings.engine.base import open_registry
from toppings.engine.build import build_engine
from toppings.messages import AddRequest
from toppings.sampling_params import SamplingParams

PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
ATTRIBUTE_BYTES = 112
"""Of `struct perf_event_attr` as of Linux 4.1: type, size, config, ..., and its flags at byte 40."""
TYPE_HARDWARE, COUNT_INSTRUCTIONS = 0, 1
INHERIT, EXCLUDE_KERNEL, EXCLUDE_HYPERVISOR = 1 << 1, 1 << 5, 1 << 6


def open_instructions() -> int | None:
    """Counts those of this process and of threads that it begins from now on."""
    number = PERF_EVENT_OPEN.get(os.uname().machine)
    if number is None:
        return None
    attribute = bytearray(ATTRIBUTE_BYTES)
    struct.pack_into("<IIQ", attribute, 0, TYPE_HARDWARE, ATTRIBUTE_BYTES, COUNT_INSTRUCTIONS)
    struct.pack_into("<Q", attribute, 40, INHERIT | EXCLUDE_KERNEL | EXCLUDE_HYPERVISOR)
    given = (ctypes.c_char * ATTRIBUTE_BYTES).from_buffer(attribute)
    found: int = ctypes.CDLL(None, use_errno=True).syscall(number, given, 0, -1, -1, 0)
    return found if found >= 0 else None


def read_instructions(descriptor: int | None) -> int | None:
    return None if descriptor is None else int(struct.unpack("<Q", os.read(descriptor, 8))[0])


class Side:
    def __init__(self, model: str, adapter: str, state_dir: str) -> None:
        self._counter = open_instructions()
        config = EngineConfig(
            model=model, state_dir=state_dir, num_threads=1, kv_cache_bytes=1 << 26, device_pool_bytes=1 << 25
        )
        registry = open_registry(config)
        self._adapter_id = registry.register("plain", Path(adapter)).adapter_id
        registry.close()
        self._engine = build_engine(config)
        self._num_requests = 0

    def run(self, load: dict[str, Any]) -> dict[str, float | int | None]:
        """From the first step on; from the one after the first tokens where the decode counts."""
        for number in range(load["num_requests"]):
            prompt = [5 + (31 * number + 7 * i) % 500 for i in range(load["num_prompt"])]
            sampling = SamplingParams(max_tokens=load["num_tokens"], temperature=0.0, ignore_eos=True)
            self._num_requests += 1
            adapter_id = self._adapter_id if load["has_adapter"] else None
            name = str(self._num_requests)
            assert (
                self._engine.add(AddRequest(name, prompt, sampling, adapter_id, is_cacheable=False)) is None
            )
        num_first = load["num_requests"] if load["num_tokens"] > 1 else 0
        while num_first > 0:
            num_first -= sum(len(output.token_ids) for output in self._engine.step())
        seconds, instructions = time.process_time(), read_instructions(self._counter)
        while self._engine.has_requests:
            self._engine.step()
        counted = read_instructions(self._counter)
        return {
            "cpu_s": time.process_time() - seconds,
            "instructions": None if counted is None or instructions is None else counted - instructions,
        }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whoever prints something else does so on standard error
    side = Side(*sys.argv[1:4])
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(side.run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
