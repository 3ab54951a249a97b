"""Do the Triton kernels compile for the GPU, without spills and with 16-byte loads? Needs no GPU.

Calls the operations as an engine does, on tensors of the model's shapes, and compiles each launch for the
given compute capability instead of running it. Prints a line a kernel and, last, one JSON line.

    python benchmarks/gpu/compile_kernels.py --capability 90
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from toppings.core import GROUPS
from toppings.model.config import ModelConfig
from toppings.model.dummy import NAMED_MODELS, named_config
from toppings.ops import dispatch, gpu_launch
from toppings.ops.activation import silu_mul
from toppings.ops.attention import AttentionMetadata, KVCache, paged_attention
from toppings.ops.gpu_plan import LoraBatch
from toppings.ops.lora import LoraForm, LoraSegments, add_lora_
from toppings.ops.norm import add_rms_norm_, rms_norm
from toppings.ops.rope import Rope, rotate_and_store_

CPU = torch.device("cpu")
PAGE_SIZE = 16
H100_MULTIPROCESSORS = 132


@dataclass
class Compiled:
    """What one launch became. `local_bytes`: registers that did not fit (spills) and arrays, per thread."""

    operation: str
    kernel: str
    registers: int
    local_bytes: int
    shared_bytes: int
    product: str
    has_wide_loads: bool


class FakeDriver:
    """A CUDA device of which nothing is known but its compute capability."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Recorder:
    """Compiles launches instead of running them, and keeps what came of it."""

    def __init__(self, capability: int) -> None:
        self.compiled: list[Compiled] = []
        self.operation = ""
        self._seen: set[str] = set()
        triton.runtime.driver.set_active(FakeDriver(capability))
        run = JITFunction.run

        def compile_only(function: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs["warmup"] = True
            kernel = run(function, *args, **kwargs)
            self._record(kernel)
            return kernel

        JITFunction.run = compile_only

    def record(self, operation: str, call: Callable[[], object]) -> None:
        self.operation = operation
        call()

    def _record(self, kernel: Any) -> None:
        if kernel.hash in self._seen:
            return
        self._seen.add(kernel.hash)
        ptx = kernel.asm["ptx"]
        registers, local_bytes = _resources(kernel.asm["cubin"])
        product = "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else "none"
        is_wide = re.search(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64|cp\.async\.cg", ptx)
        self.compiled.append(
            Compiled(
                self.operation,
                kernel.metadata.name,
                registers,
                local_bytes,
                kernel.metadata.shared,
                product,
                is_wide is not None,
            )
        )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, as cuobjdump says."""
    tool = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def record_lora(
    recorder: Recorder, model: ModelConfig, dtype: torch.dtype, form: LoraForm, num_rows: int
) -> None:
    table = torch.zeros(8, 1, 7, 3, dtype=torch.int64)
    segments = LoraSegments(list(range(0, num_rows + 1, num_rows // 8)), list(range(8)), max_rank=64)
    segments.batches[CPU] = LoraBatch.build(segments, CPU, form)
    offsets = model.group_out_offsets()
    for group, modules in GROUPS.items():
        sizes = [model.base_shapes()[1][module] for module in modules]
        x = torch.empty(num_rows, sizes[0][0], dtype=dtype)
        y = torch.empty(num_rows, sum(num_out for _, num_out in sizes), dtype=dtype)
        recorder.record(
            f"lora {form} {group}",
            partial(
                add_lora_,
                y,
                x,
                arena=torch.empty(1024, dtype=dtype),
                table=table,
                layer=0,
                group=modules,
                out_offsets=offsets[group],
                segments=segments,
            ),
        )


def record_elementwise(recorder: Recorder, model: ModelConfig, dtype: torch.dtype, num_rows: int) -> None:
    x, weight = (
        torch.empty(num_rows, model.hidden_size, dtype=dtype),
        torch.empty(model.hidden_size, dtype=dtype),
    )
    recorder.record("rms_norm", lambda: rms_norm(x, weight, 1e-5))
    recorder.record("add_rms_norm", lambda: add_rms_norm_(x, x.clone(), weight, 1e-5))
    gate_up = torch.empty(num_rows, 2 * model.intermediate_size, dtype=dtype)
    recorder.record("silu_mul", lambda: silu_mul(gate_up))
    width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    qkv, slots = torch.empty(num_rows, width, dtype=dtype), torch.arange(num_rows)
    cache = KVCache.allocate(1, 1, num_rows, model.num_kv_heads, model.head_dim, dtype, CPU)
    cos, sin = Rope(torch.ones(model.head_dim // 2)).cos_sin(slots)
    recorder.record(
        "rotate_and_store", lambda: rotate_and_store_(qkv, cos, sin, cache.k[0], cache.v[0], slots)
    )


def record_attention(
    recorder: Recorder, model: ModelConfig, dtype: torch.dtype, query_lens: list[int], context: int
) -> None:
    num = len(query_lens)
    indptr = [sum(query_lens[:i]) for i in range(num + 1)]
    num_pages = context // PAGE_SIZE
    tables = torch.zeros(num, num_pages, dtype=torch.int32)
    num_decodes = num if query_lens[0] == 1 else 0
    meta = AttentionMetadata(
        num_decodes, indptr, [context] * num, tables, torch.zeros(indptr[-1], dtype=torch.int64), PAGE_SIZE
    )
    cache = KVCache.allocate(1, num_pages, PAGE_SIZE, model.num_kv_heads, model.head_dim, dtype, CPU)
    heads = torch.empty(indptr[-1], model.num_heads + 2 * model.num_kv_heads, model.head_dim, dtype=dtype)
    q, k, v = heads.tensor_split((model.num_heads, model.num_heads + model.num_kv_heads), dim=1)
    name = "decode" if num_decodes else "prefill"
    recorder.record(
        f"attention {name} of {num}",
        lambda: paged_attention(q, k, v, cache.k[0], cache.v[0], meta, scale=0.1),
    )


def compile_all(recorder: Recorder, model: ModelConfig, dtype: torch.dtype) -> None:
    record_elementwise(recorder, model, dtype, 32)
    for num in (1, 32):
        record_attention(recorder, model, dtype, [1] * num, 512)
    record_attention(recorder, model, dtype, [128, 128], 256)
    forms: tuple[tuple[LoraForm, int], ...] = (("mbgmv", 32), ("bgmv", 32), ("sgmv", 1024))
    for form, num_rows in forms:
        record_lora(recorder, model, dtype, form, num_rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, default=90, help="compute capability, major · 10 + minor")
    parser.add_argument("--model", choices=NAMED_MODELS, default="llama-2-7b")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parser.parse_args()
    dispatch.TRITON_DEVICES = ("cpu",)
    gpu_launch.MULTIPROCESSORS_WITHOUT_GPU = H100_MULTIPROCESSORS
    recorder = Recorder(options.capability)
    compile_all(recorder, named_config(options.model), getattr(torch, options.dtype))
    for kernel in recorder.compiled:
        print(
            f"{kernel.operation:22} {kernel.kernel:26} {kernel.registers:4} registers"
            f" {kernel.local_bytes:5} B local {kernel.shared_bytes:7} B shared"
            f"  product {kernel.product:6} wide loads {kernel.has_wide_loads}"
        )
    narrow = [k.kernel for k in recorder.compiled if not k.has_wide_loads]
    spilling = [k.kernel for k in recorder.compiled if k.local_bytes]
    print(
        json.dumps(
            {
                "benchmark": "compile_kernels",
                "triton": triton.__version__,
                "capability": options.capability,
                "model": options.model,
                "dtype": options.dtype,
                "spilling": spilling,
                "without_wide_loads": narrow,
                "kernels": [asdict(kernel) for kernel in recorder.compiled],
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
