"""Which form of the LoRA kernels serves decode steps on a GPU: as configured, or the faster one."""

import logging
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from toppings.adapters.device_pool import DevicePool
from toppings.adapters.layout import AdapterLayout, BaseShapes
from toppings.config import EngineConfig
from toppings.core import GROUPS, MODULES
from toppings.engine.graphs import CudaGraphs, GraphBackend
from toppings.model.config import ModelConfig
from toppings.ops import dispatch
from toppings.ops.gpu_plan import LoraBatch
from toppings.ops.lora import DEFAULT_DECODE_FORM, LoraForm, LoraSegments, add_lora_

logger = logging.getLogger(__name__)

FORMS: tuple[LoraForm, ...] = ("mbgmv", "bgmv")
RANKS = (8, 16, 32, 64) * 4
ROWS_EACH = 2
NUM_LAYERS = 4
"""More weights than a GPU's cache holds, for a model of 7 billion parameters."""
NUM_TIMES = 7


def choose_decode_form(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> LoraForm:
    """Nothing is timed on the CPU or without Triton, where there is one form, nor for a split model, whose
    parts must agree."""
    for form in FORMS:
        if config.decode_lora_form == form:
            return form
    if config.device not in dispatch.TRITON_DEVICES or config.tensor_parallel_size > 1:
        return DEFAULT_DECODE_FORM
    return fastest_form(time_forms(model, dtype, config.device, CudaGraphs(), torch.cuda))


def fastest_form(times_ms: dict[LoraForm, float]) -> LoraForm:
    form = min(times_ms, key=lambda form: times_ms[form])
    figures = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times_ms.items())
    logger.info("decode steps use the LoRA kernels %s (%s for %d layers)", form, figures, NUM_LAYERS)
    return form


@torch.inference_mode()
def time_forms(
    model: ModelConfig, dtype: torch.dtype, device: str, backend: GraphBackend, cuda: Any
) -> dict[LoraForm, float]:
    """Median ms of each form for the q, k and v of a few layers: 32 rows of 16 adapters, two each, of ranks 8
    to 64. `cuda`: the `torch.cuda` module, or a fake."""
    run = _work(model, dtype, device)
    graphs = {form: backend.capture(partial(run, form)) for form in FORMS}
    times: dict[LoraForm, list[float]] = {form: [] for form in FORMS}
    for _ in range(NUM_TIMES):
        for form, graph in graphs.items():
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[form].append(start.elapsed_time(end))
    return {form: median(values[1:]) for form, values in times.items()}


def _work(model: ModelConfig, dtype: torch.dtype, device: str) -> Callable[[LoraForm], None]:
    """Computes the products of all layers in a form."""
    shapes = BaseShapes(NUM_LAYERS, model.base_shapes()[1])
    modules, offsets = GROUPS["qkv"], model.group_out_offsets()["qkv"]
    name = str(dtype).removeprefix("torch.")
    ranks = [[rank if m in modules else 0 for m in range(len(MODULES))] for rank in RANKS]
    layouts = [AdapterLayout.build([each] * NUM_LAYERS, shapes, name) for each in ranks]
    num_bytes = sum(layout.num_bytes for layout in layouts)
    pool = DevicePool(NUM_LAYERS, num_bytes, dtype, device, num_slots=len(layouts))
    pool.arena.zero_()
    slots = [slot for layout in layouts if (slot := pool.try_place(layout)) is not None]
    segments = LoraSegments([ROWS_EACH * i for i in range(len(slots) + 1)], slots, max(RANKS))
    x = torch.ones(segments.indptr[-1], shapes.sizes[modules[0]][0], dtype=dtype, device=device)
    y = torch.zeros(x.shape[0], sum(shapes.sizes[m][1] for m in modules), dtype=dtype, device=device)
    batches = {form: LoraBatch.build(segments, x.device, form) for form in FORMS}

    def run(form: LoraForm) -> None:
        segments.batches[x.device] = batches[form]
        for layer in range(NUM_LAYERS):
            add_lora_(
                y,
                x,
                arena=pool.arena,
                table=pool.table,
                layer=layer,
                group=modules,
                out_offsets=offsets,
                segments=segments,
            )

    return run
