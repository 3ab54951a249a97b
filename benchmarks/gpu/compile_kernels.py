"""Do the Triton kernels compile for GPUs, without spills, with 16-byte loads and within the shared memory
that a program may have? Needs no GPU.

Calls the operations as an engine does, on tensors of the model's shapes, and compiles each launch for the
given compute capabilities instead of running it. Prints a line a kernel and, last, one JSON line.

    python benchmarks/gpu/compile_kernels.py --capabilities 80 86 89 90 120
    python benchmarks/gpu/compile_kernels.py --capabilities 86 --dtype float32
    python benchmarks/gpu/compile_kernels.py --matrix    # what is most likely to fail on each, in both types
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
from toppings.model.named import NAMED_MODELS, named_config
from toppings.ops import dispatch, gpu_launch
from toppings.ops.activation import clamped_swiglu, gelu_mul, silu_mul
from toppings.ops.attention import AttentionMetadata, KVCache, paged_attention
from toppings.ops.columns import adjust_columns_
from toppings.ops.experts import ExpertLinears, GroupedRows
from toppings.ops.gpu_plan import LoraBatch
from toppings.ops.gpu_sampling import draw_uncertain_
from toppings.ops.lora import LoraForm, LoraSegments, add_lora_
from toppings.ops.norm import add_rms_norm_, rms_norm
from toppings.ops.rope import Rope, rotate_and_store_

CPU = torch.device("cpu")
PAGE_SIZE = 16
H100_MULTIPROCESSORS = 132
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
"""What a program may have (CUDA C++ Programming Guide, technical specifications per compute capability)."""


@dataclass
class Compiled:
    """What one launch became. `local_bytes`: registers that did not fit (spills) and arrays, per thread.
    `num_buffers`: in shared memory, of the operand that has the fewest, 0 where nothing is loaded ahead.
    `launch`: "early", before the kernel ahead has ended, "ahead" of one that is, or "plain"."""

    capability: int
    dtype: str
    operation: str
    kernel: str
    registers: int
    local_bytes: int
    shared_bytes: int
    product: str
    has_wide_loads: bool
    num_buffers: int
    launch: str


class FakeDriver:
    """A CUDA device of which nothing is known but its compute capability."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        """A number of its own: Triton keeps what it has compiled by device."""
        return self._capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Recorder:
    """Compiles launches instead of running them, and keeps what came of it."""

    def __init__(self) -> None:
        self.compiled: list[Compiled] = []
        self.operation = self.dtype = ""
        self.capability = 0
        self._seen: set[str] = set()
        run = JITFunction.run

        def compile_only(function: Any, *args: Any, **kwargs: Any) -> None:
            kwargs["warmup"] = True
            self._record(run(function, *args, **kwargs))  # nothing for `gpu_launch.Kernel` to launch again

        JITFunction.run = compile_only

    def compile_for(self, capability: int, dtype: str) -> None:
        """From here on."""
        self.capability, self.dtype = capability, dtype
        gpu_launch.CAPABILITY_WITHOUT_GPU = capability
        triton.runtime.driver.set_active(FakeDriver(capability))

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
                self.capability,
                self.dtype,
                self.operation,
                kernel.metadata.name,
                registers,
                local_bytes,
                kernel.metadata.shared,
                product,
                is_wide is not None,
                _num_buffers(kernel.asm["ttgir"]),
                _launch(kernel),
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


def _num_buffers(ttgir: str) -> int:
    """Tiles that loads fill while products read others: [buffers, rows, columns]."""
    buffers = [int(n) for n in re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x", ttgir)]
    return min(buffers, default=0)


def _launch(kernel: Any) -> str:
    ptx = kernel.asm["ptx"]
    waits = "griddepcontrol.wait" in ptx
    assert waits == kernel.metadata.launch_pdl, "a kernel that is launched early waits, and no other"
    return "early" if waits else "ahead" if "griddepcontrol.launch_dependents" in ptx else "plain"


def record_lora(
    recorder: Recorder,
    model: ModelConfig,
    dtype: torch.dtype,
    form: LoraForm,
    num_rows: int,
    groups: Sequence[str] = tuple(GROUPS),
) -> None:
    table = torch.zeros(8, 1, 7, 3, dtype=torch.int64)
    segments = LoraSegments(list(range(0, num_rows + 1, num_rows // 8)), list(range(8)), max_rank=64)
    segments.batches[CPU] = LoraBatch.build(segments, CPU, form)
    offsets = model.group_out_offsets()
    for group in groups:
        modules = GROUPS[group]
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


def record_columns(recorder: Recorder, model: ModelConfig, dtype: torch.dtype, num_rows: int) -> None:
    offsets = model.group_out_offsets()["qkv"]
    y = torch.empty(num_rows, offsets[2] + model.kv_size, dtype=dtype)
    places, arena = torch.zeros(8, 7, 2, dtype=torch.int64), torch.empty(1024, dtype=dtype)
    segments = LoraSegments(list(range(0, num_rows + 1, num_rows // 8)), list(range(8)))
    recorder.record(
        "adjust columns",
        partial(adjust_columns_, y, arena=arena, places=places, out_offsets=offsets, segments=segments),
    )


def record_experts(recorder: Recorder, dtype: torch.dtype, *, has_many: bool) -> None:
    """One projection of all experts, of Qwen3-30B-A3B's shape but for their number."""
    num, num_in, num_out = 2, 2048, 1536
    num_rows = 128 if has_many else 8
    experts = torch.arange(num_rows)[:, None] % num
    x, weight = torch.empty(num_rows, num_in, dtype=dtype), torch.empty(num * num_out, num_in, dtype=dtype)
    bias = torch.empty(num, num_out, dtype=dtype)
    rows = GroupedRows.of(experts, num)
    assert rows.has_many == has_many
    name = f"experts, {'many' if has_many else 'few'} rows"
    recorder.record(name, lambda: ExpertLinears(weight, num)(x, rows))
    recorder.record(f"{name}, biases", lambda: ExpertLinears(weight, num, bias=bias)(x, rows))


def record_elementwise(recorder: Recorder, model: ModelConfig, dtype: torch.dtype, num_rows: int) -> None:
    x, weight = (
        torch.empty(num_rows, model.hidden_size, dtype=dtype),
        torch.empty(model.hidden_size, dtype=dtype),
    )
    recorder.record("rms_norm", lambda: rms_norm(x, weight, 1e-5))
    recorder.record("add_rms_norm", lambda: add_rms_norm_(x, x.clone(), weight, 1e-5))
    gate_up = torch.empty(num_rows, 2 * model.intermediate_size, dtype=dtype)
    recorder.record("silu_mul", lambda: silu_mul(gate_up))
    recorder.record("gelu_mul", lambda: gelu_mul(gate_up))
    recorder.record("clamped_swiglu", lambda: clamped_swiglu(gate_up, alpha=1.702, limit=7.0))
    width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    qkv, slots = torch.empty(num_rows, width, dtype=dtype), torch.arange(num_rows)
    cache = KVCache.allocate(1, 1, num_rows, model.num_kv_heads, model.head_dim, dtype, CPU)
    for name, part in (("rotate_and_store", 2), ("rotate_and_store a part", 4)):
        cos, sin = Rope(torch.ones(model.head_dim // part)).cos_sin(slots)
        recorder.record(name, partial(rotate_and_store_, qkv, cos, sin, cache.k[0], cache.v[0], slots))


def record_attention(
    recorder: Recorder,
    model: ModelConfig,
    dtype: torch.dtype,
    query_lens: list[int],
    context: int,
    softcap: float = 0.0,
    *,
    has_sinks: bool = False,
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
    sinks = torch.empty(model.num_heads) if has_sinks else None
    name = "decode" if num_decodes else "prefill"
    recorder.record(
        f"attention {name} of {num}{', capped' if softcap else ''}{', with sinks' if has_sinks else ''}",
        lambda: paged_attention(
            q, k, v, cache.k[0], cache.v[0], meta, scale=0.1, softcap=softcap, sinks=sinks
        ),
    )


def record_sampling(recorder: Recorder, model: ModelConfig) -> None:
    probs, limits = torch.empty(2, model.vocab_size), torch.ones(2)
    token_ids, top_k = torch.zeros(2, 2, dtype=torch.int64)
    rows = (token_ids, probs, limits > 1, top_k, limits, limits, limits.double())
    recorder.record("draw", lambda: draw_uncertain_(*rows))


def compile_all(recorder: Recorder, model: ModelConfig, dtype: torch.dtype) -> None:
    record_elementwise(recorder, model, dtype, 32)
    for num_rows in (32, 1024):
        record_columns(recorder, model, dtype, num_rows)
    for num in (1, 32):
        record_attention(recorder, model, dtype, [1] * num, 512)
    record_attention(recorder, model, dtype, [128, 128], 256)
    record_sampling(recorder, model)
    for has_many in (True, False):
        record_experts(recorder, dtype, has_many=has_many)
    forms: tuple[tuple[LoraForm, int], ...] = (("mbgmv", 32), ("bgmv", 32), ("sgmv", 1024))
    for form, num_rows in forms:
        record_lora(recorder, model, dtype, form, num_rows)


def compile_matrix(recorder: Recorder, model: ModelConfig) -> None:
    """What is widest, in bfloat16 for every chip and in fp32 for the one with the least memory; what is alike
    for all chips for one."""
    smallest = min(SHARED_BYTES, key=SHARED_BYTES.__getitem__)
    wide = replace(model, num_heads=8, num_kv_heads=4, head_dim=256)  # Gemma 2's
    for name in ("float32", "bfloat16"):
        recorder.compile_for(smallest, name)
        for query_lens in ([1], [128, 128]):
            record_attention(recorder, wide, getattr(torch, name), query_lens, 256, softcap=50.0)
            record_attention(recorder, model, getattr(torch, name), query_lens, 256, has_sinks=True)
    for capability, name in [(smallest, "float32"), *((chip, "bfloat16") for chip in SHARED_BYTES)]:
        dtype = getattr(torch, name)
        recorder.compile_for(capability, name)
        record_attention(recorder, model, dtype, [128, 128], 256)
        record_lora(recorder, model, dtype, "sgmv", 1024, ["qkv"])
        record_experts(recorder, dtype, has_many=True)
        if capability != 89:  # its small kernels are those of 8.6
            record_attention(recorder, model, dtype, [1], 512)
            record_lora(recorder, model, dtype, "mbgmv", 32, ["down"])
            record_experts(recorder, dtype, has_many=False)
    record_elementwise(recorder, model, torch.bfloat16, 32)
    record_columns(recorder, model, torch.bfloat16, 32)
    record_sampling(recorder, model)
    record_lora(recorder, model, torch.bfloat16, "bgmv", 32, ["qkv"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capabilities", type=int, nargs="+", choices=SHARED_BYTES, default=[90])
    parser.add_argument("--model", choices=NAMED_MODELS, default="llama-2-7b")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--matrix", action="store_true", help="a few kernels, of all capabilities")
    options = parser.parse_args()
    dispatch.TRITON_DEVICES = ("cpu",)
    gpu_launch.MULTIPROCESSORS_WITHOUT_GPU = H100_MULTIPROCESSORS
    recorder, model = Recorder(), named_config(options.model)
    if options.matrix:
        compile_matrix(recorder, model)
    else:
        for capability in options.capabilities:
            recorder.compile_for(capability, options.dtype)
            compile_all(recorder, model, getattr(torch, options.dtype))
    for kernel in recorder.compiled:
        print(
            f"{kernel.capability} {kernel.dtype:8} {kernel.operation:22} {kernel.kernel:26}"
            f" {kernel.registers:4} registers {kernel.local_bytes:5} B local {kernel.shared_bytes:7} B shared"
            f"  product {kernel.product:6} wide loads {kernel.has_wide_loads} buffers {kernel.num_buffers}"
        )

    def names(is_meant: Callable[[Compiled], bool]) -> list[str]:
        return [
            f"{k.capability} {k.dtype} {k.operation} {k.kernel}" for k in recorder.compiled if is_meant(k)
        ]

    result = {
        "benchmark": "compile_kernels",
        "triton": triton.__version__,
        "model": options.model,
        "spilling": names(lambda k: k.local_bytes > 0),
        "over_shared": names(lambda k: k.shared_bytes > SHARED_BYTES[k.capability]),
        "without_wide_loads": names(lambda k: not k.has_wide_loads),
        "kernels": [asdict(kernel) for kernel in recorder.compiled],
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
