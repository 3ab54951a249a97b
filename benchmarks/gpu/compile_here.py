"""Compiles, on all cores, what the benchmarks launch on this machine's GPU, into Triton's cache.

    python benchmarks/gpu/compile_here.py                    # Llama-2-7B's shape, and correctness.py's models
    python benchmarks/gpu/compile_here.py --capability 90    # for a GPU that is not here: for an image, say

Every process asks for all kernels as an engine does when it starts (host_steps.py) and compiles its share of
them. The GPU is asked for its compute capability and is not used otherwise.
"""

import argparse
import os
import subprocess
import sys
import time
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from compile_kernels import H100_MULTIPROCESSORS, SHARED_BYTES, FakeDriver
from host_steps import META, World
from triton.runtime.jit import JITFunction

from toppings.model.config import ModelConfig
from toppings.model.named import NAMED_MODELS, named_config
from toppings.ops import dispatch, gpu_launch

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}
"""The model of correctness.py."""


class Share:
    """Of all kernels that are asked for, compiles every `of`-th from `part` on."""

    def __init__(self, part: int, of: int) -> None:
        self.num_kinds = self.num_compiled = 0
        seen: set[tuple[str, Any]] = set()
        compile_kind = JITFunction._do_compile

        def compile_share(
            function: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, *more: Any
        ) -> None:
            if (function.__name__, key) in seen:
                return
            seen.add((function.__name__, key))
            self.num_kinds += 1
            if self.num_kinds % of == part:
                self.num_compiled += 1
                attributes, _ = more
                compile_kind(function, key, signature, device, constants, options, attributes, True)
                function.device_caches[device][0].pop(key)  # or it would be launched next time

        JITFunction._do_compile = compile_share


def models(name: str) -> list[tuple[ModelConfig, torch.dtype]]:
    """Two layers of each, since all are alike."""
    small = named_config("llama-2-7b", num_hidden_layers=2, **SMALL)
    large = named_config(name, num_hidden_layers=2)
    return [(large, torch.bfloat16), (small, torch.bfloat16), (small, torch.float32)]


def compile_share(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(FakeDriver(options.capability))
    dispatch.TRITON_DEVICES = (META.type,)
    gpu_launch.CAPABILITY_WITHOUT_GPU = options.capability
    gpu_launch.MULTIPROCESSORS_WITHOUT_GPU = H100_MULTIPROCESSORS
    share = Share(options.part, options.processes)
    for model, dtype in models(options.model):
        World(model, dtype)
        World(model, dtype, "bgmv")
    print(f"part {options.part}: {share.num_compiled} of {share.num_kinds} kernels")


def capability_here() -> int:
    """In a process of its own: the GPU is nobody's before the benchmarks begin."""
    ask = "import torch; major, minor = torch.cuda.get_device_capability(); print(10 * major + minor)"
    told = subprocess.run([sys.executable, "-c", ask], check=True, capture_output=True, text=True)
    return int(told.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=NAMED_MODELS, default="llama-2-7b")
    parser.add_argument("--capability", type=int, choices=SHARED_BYTES, help="default: this GPU's")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--part", type=int, help="of one of the processes")
    options, _ = parser.parse_known_args()  # all.sh gives every script's options
    options.capability = options.capability or capability_here()
    if options.part is not None:
        compile_share(options)
        return 0
    began_at = time.monotonic()
    command = [sys.executable, __file__, "--model", options.model, "--capability", str(options.capability)]
    command += ["--processes", str(options.processes)]
    parts = [subprocess.Popen([*command, "--part", str(i)]) for i in range(options.processes)]
    statuses = [part.wait() for part in parts]
    print(f"compiled for {options.capability} in {time.monotonic() - began_at:.0f} s")
    return max(map(abs, statuses))


if __name__ == "__main__":
    sys.exit(main())
