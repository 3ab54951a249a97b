"""Are the Triton kernels right on this GPU, and how near to what its memory and its matrix units allow?

    python benchmarks/gpu/kernel_speed.py               # everything, on a GPU
    python benchmarks/gpu/kernel_speed.py --model llama-3.1-8b
    python benchmarks/gpu/kernel_speed.py --toy --device cpu  # right at small sizes? Interpreted

Limits are measured first, in the same run: bandwidth of a device-to-device copy (bytes read and written) and
rate of a bfloat16 product. Times are medians over replays of a CUDA graph that goes through the layers of a
pool larger than the L2 cache. `ratio` is time over floor: bytes over bandwidth, or operations over rate,
whichever takes longer. Ends in one JSON line; exits with 1 where a result is wrong. Not yet run on a GPU.
"""

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
from common import copy_gbps, finish, make_parser, matmul_tflops, note
from torch import Tensor

from toppings.core import GROUPS, MODULES
from toppings.lab.aims import at_most
from toppings.model.config import ModelConfig
from toppings.model.named import named_config
from toppings.ops import dispatch
from toppings.ops.activation import silu_mul, silu_mul_reference
from toppings.ops.attention import AttentionMetadata, KVCache, paged_attention, paged_attention_reference
from toppings.ops.gpu_plan import LoraBatch
from toppings.ops.lora import LoraForm, LoraSegments, add_lora_, add_lora_reference_
from toppings.ops.norm import add_rms_norm_, rms_norm_reference

CUDA: Any = torch.cuda
DEVICE = torch.device("cuda:0" if CUDA.is_available() else "cpu")
PAGE_SIZE = 16
TOLERANCE = 0.01  # of ‖out − reference‖ / ‖reference‖ with bfloat16 operands
REPLAYS = 20
TOY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass
class Limits:
    copy_gbps: float
    matmul_tflops: float


@dataclass
class Timing:
    question: str
    us: float
    floor_us: float
    ratio: float


def median_us(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of one call, of graph replays that make all of them in turn."""
    for call in calls:
        call()
    graph = CUDA.CUDAGraph()
    with CUDA.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(REPLAYS):
        start, end = (CUDA.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[3:])


class World:
    """A model's sizes and the adapters of a pool, `num_layers` layers of each."""

    def __init__(self, model: ModelConfig, ranks: list[dict[int, int]], num_layers: int) -> None:
        self.model, self.ranks, self.num_layers = model, ranks, num_layers
        self.sizes = model.base_shapes()[1]
        table = torch.zeros(len(ranks), num_layers, len(MODULES), 3, dtype=torch.int64)
        used = 0
        for slot, layer in ((s, n) for s in range(len(ranks)) for n in range(num_layers)):
            for half in (0, 1):
                for module, rank in sorted(ranks[slot].items()):
                    table[slot, layer, module, half], table[slot, layer, module, 2] = used, rank
                    used += rank * self.sizes[module][half]
            used = -(-used // 32) * 32
        self.table = table.to(DEVICE)
        self.arena = torch.randn(used, device=DEVICE, dtype=torch.bfloat16) / model.hidden_size**0.5

    def segments(self, slots: list[int], rows_each: int, form: LoraForm) -> LoraSegments:
        """Every adapter of `slots` has `rows_each` rows."""
        max_rank = max(rank for by_module in self.ranks for rank in by_module.values())
        segments = LoraSegments([rows_each * i for i in range(len(slots) + 1)], slots, max_rank=max_rank)
        segments.batches[DEVICE] = LoraBatch.build(segments, DEVICE, form)
        return segments

    def tensors(self, group: str, num_rows: int) -> tuple[Tensor, Tensor]:
        sizes = [self.sizes[module] for module in GROUPS[group]]
        x = torch.randn(num_rows, sizes[0][0], device=DEVICE, dtype=torch.bfloat16)
        return x, torch.randn(num_rows, sum(n for _, n in sizes), device=DEVICE, dtype=torch.bfloat16)

    def add(
        self, add: Callable[..., None], y: Tensor, x: Tensor, group: str, layer: int, s: LoraSegments
    ) -> None:
        add(
            y,
            x,
            arena=self.arena,
            table=self.table,
            layer=layer,
            group=GROUPS[group],
            out_offsets=self.model.group_out_offsets()[group],
            segments=s,
        )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def check_lora(model: ModelConfig) -> dict[str, float]:
    """Error of each form for ranks of 1 to 512, distinct to identical adapters and awkward batches; in the
    interpreter, which takes its time, for a few rows and ranks."""
    is_interpreted = DEVICE.type == "cpu"
    ranks = [1, 33] if is_interpreted else [1, 8, 16, 33, 64, 128, 512]
    world = World(model, [dict.fromkeys(range(7), rank) for rank in ranks], 1)
    errors: dict[str, float] = {}
    shapes = [(2, 2)] if is_interpreted else [(1, 1), (3, 1), (7, 1), (33, 1), (7, 19)]
    forms: tuple[LoraForm, ...] = ("sgmv", "mbgmv", "bgmv")
    for form in forms:
        worst = 0.0
        for num_adapters, rows_each in shapes:
            segments = world.segments([i % len(ranks) for i in range(num_adapters)], rows_each, form)
            for group in GROUPS:
                x, y = world.tensors(group, num_adapters * rows_each)
                y.zero_()  # so that the product's own error is seen, not the sum's rounding
                expected = y.float()
                world.add(add_lora_reference_, expected, x, group, 0, segments)
                world.add(add_lora_, y, x, group, 0, segments)
                worst = max(worst, relative_error(y, expected))
        errors[f"lora {form}"] = worst
    return errors


def attention_step(
    model: ModelConfig, query_lens: list[int], context_lens: list[int]
) -> tuple[Tensor, Tensor, Tensor, KVCache, AttentionMetadata]:
    num_pages = [-(-length // PAGE_SIZE) for length in context_lens]
    pages = torch.randperm(sum(num_pages), dtype=torch.int32).split(num_pages)  # type: ignore[no-untyped-call]
    tables = torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True).to(DEVICE)
    indptr = [sum(query_lens[:i]) for i in range(len(query_lens) + 1)]
    num_decodes = len(query_lens) if query_lens[0] == 1 else 0
    slots = torch.zeros(indptr[-1], dtype=torch.int64, device=DEVICE)
    meta = AttentionMetadata(num_decodes, indptr, context_lens, tables, slots, PAGE_SIZE)
    heads, kv = model.num_heads, model.num_kv_heads
    cache = KVCache.allocate(1, sum(num_pages), PAGE_SIZE, kv, model.head_dim, torch.bfloat16, DEVICE)
    cache.k[0].normal_()
    cache.v[0].normal_()
    qkv = torch.randn(indptr[-1], heads + 2 * kv, model.head_dim, device=DEVICE).to(torch.bfloat16)
    for s, length in enumerate(context_lens):  # the step's own keys are in the cache already
        rows = slice(indptr[s], indptr[s + 1])
        cached = meta.cache_rows(s)[length - query_lens[s] :]
        qkv[rows, heads : heads + kv], qkv[rows, heads + kv :] = cache.k[0][cached], cache.v[0][cached]
    q, k, v = qkv.tensor_split((heads, heads + kv), dim=1)
    return q, k, v, cache, meta


def check_others(model: ModelConfig) -> dict[str, float]:
    scale = model.head_dim**-0.5
    errors: dict[str, float] = {}
    steps = {
        "attention decode": ([1] * 3, [1, 40, 300]),
        "attention whole prompts": ([70, 9], [70, 9]),
        "attention chunks": ([70, 9], [100, 300]),
    }
    for name, (queries, contexts) in steps.items():
        q, k, v, cache, meta = attention_step(model, queries, contexts)
        actual = paged_attention(q, k, v, cache.k[0], cache.v[0], meta, scale=scale)
        expected = paged_attention_reference(q.float(), cache.k[0], cache.v[0], meta, scale=scale)
        errors[name] = relative_error(actual, expected)
    x, residual = torch.randn(2, 33, model.hidden_size, device=DEVICE).to(torch.bfloat16)
    weight = torch.rand(model.hidden_size, device=DEVICE).to(torch.bfloat16)
    expected = rms_norm_reference((x + residual).float(), weight.float(), 1e-5)
    errors["add_rms_norm"] = relative_error(add_rms_norm_(x, residual, weight, 1e-5), expected)
    gate_up = torch.randn(33, 2 * model.intermediate_size, device=DEVICE).to(torch.bfloat16)
    errors["silu_mul"] = relative_error(silu_mul(gate_up), silu_mul_reference(gate_up.float()))
    return errors


def time_lora_decode(model: ModelConfig, limits: Limits) -> list[Timing]:
    """Batch 32 on q, k, v: what the published figures are about, in both decode forms."""
    timings = []
    for num_adapters, rank in ((8, 16), (32, 64), (1, 64)):
        world = World(model, [dict.fromkeys(GROUPS["qkv"], rank)] * num_adapters, 32)
        x, y = world.tensors("qkv", 32)
        io = sum(sum(world.sizes[module]) for module in GROUPS["qkv"])
        num_bytes = 2 * (num_adapters * rank * io + x.numel() + 2 * y.numel())
        forms: tuple[LoraForm, ...] = ("mbgmv", "bgmv")
        for form in forms:
            segments = world.segments(list(range(num_adapters)), 32 // num_adapters, form)
            us = median_us([partial(world.add, add_lora_, y, x, "qkv", n, segments) for n in range(32)])
            question = f"lora {form} decode, 32 rows, {num_adapters} adapters of rank {rank} on qkv, a layer"
            timings.append(timing(question, us, num_bytes, 0, limits))
    return timings


def time_lora_prefill(model: ModelConfig, limits: Limits) -> list[Timing]:
    world = World(model, [dict.fromkeys(range(7), 64)], 32)
    segments, timings = world.segments([0], 2048, "sgmv"), []
    for group, modules in GROUPS.items():
        x, y = world.tensors(group, 2048)
        io = sum(sum(world.sizes[module]) for module in modules)
        num_bytes = 2 * (64 * io + x.numel() + 2 * y.numel())
        us = median_us([partial(world.add, add_lora_, y, x, group, n, segments) for n in range(32)])
        question = f"lora sgmv prefill, 2048 rows of rank 64 on {group}, a layer"
        timings.append(timing(question, us, num_bytes, 2 * 2048 * 64 * io, limits))
    return timings


def time_attention(model: ModelConfig, limits: Limits) -> list[Timing]:
    timings = []
    decodes = ([512] * 32, [512], [8192] * 4, [512] * 63 + [32_768])
    for queries, contexts in (*(([1] * len(lens), lens) for lens in decodes), ([2048], [2048])):
        q, k, v, cache, meta = attention_step(model, queries, contexts)
        us = median_us([partial(paged_attention, q, k, v, cache.k[0], cache.v[0], meta, scale=0.1)] * 8)
        kv_bytes = 2 * 2 * sum(contexts) * model.kv_size
        pairs = sum(n * (c - (n - 1) / 2) for n, c in zip(queries, contexts))
        operations = 4 * pairs * model.q_size
        lengths = " and ".join(f"{contexts.count(n)} of {n}" for n in sorted(set(contexts)))
        question = f"attention, {len(queries)} x {queries[0]} queries, contexts {lengths}, a layer"
        timings.append(timing(question, us, kv_bytes + 4 * q.numel(), operations, limits))
    return timings


def time_elementwise(model: ModelConfig, limits: Limits) -> list[Timing]:
    timings = []
    for num_rows in (32, 8192):
        x, residual = torch.randn(2, num_rows, model.hidden_size, device=DEVICE).to(torch.bfloat16)
        weight = torch.rand(model.hidden_size, device=DEVICE).to(torch.bfloat16)
        gate_up = torch.randn(num_rows, 2 * model.intermediate_size, device=DEVICE).to(torch.bfloat16)
        us = median_us([partial(add_rms_norm_, x, residual, weight, 1e-5)] * 8)
        timings.append(timing(f"add_rms_norm, {num_rows} rows", us, 4 * x.nbytes, 0, limits))
        us = median_us([partial(silu_mul, gate_up)] * 8)
        timings.append(timing(f"silu_mul, {num_rows} rows", us, gate_up.nbytes * 3 // 2, 0, limits))
    return timings


def timing(question: str, us: float, num_bytes: float, operations: float, limits: Limits) -> Timing:
    floor_us = max(num_bytes / limits.copy_gbps / 1e3, operations / limits.matmul_tflops / 1e6)
    return Timing(question, us, floor_us, us / floor_us)


def main() -> int:
    parser = make_parser(__doc__)
    options = parser.parse_args()
    if DEVICE.type != options.device or (options.device == "cpu" and not options.toy):
        parser.error(
            f"device is {options.device}, here there is {DEVICE.type}; without a GPU only the toy runs"
        )
    dispatch.TRITON_DEVICES = (DEVICE.type,)
    torch.manual_seed(0)
    model = named_config(options.model, **TOY) if options.toy else named_config(options.model)
    errors = {**check_lora(model), **check_others(model)}
    result: dict[str, Any] = {"triton": triton.__version__, "errors": errors}
    if not options.toy:
        limits = Limits(copy_gbps(options), matmul_tflops(options))
        timings: list[Timing] = []
        for time_all in (time_lora_decode, time_lora_prefill, time_attention, time_elementwise):
            timings += time_all(model, limits)
            note("kernel_speed", options, **result, timings=[asdict(t) for t in timings])
        for t in timings:
            print(f"{t.question:70} {t.us:8.1f} us  floor {t.floor_us:8.1f} us  ratio {t.ratio:5.2f}")
        result |= {"limits": asdict(limits), "timings": [asdict(t) for t in timings]}
    aims = [at_most(f"{name}: relative error", error, TOLERANCE) for name, error in errors.items()]
    finish("kernel_speed", options, aims, **result)
    return 0 if all(aim.is_met for aim in aims) else 1


if __name__ == "__main__":
    sys.exit(main())
