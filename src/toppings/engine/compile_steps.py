"""Compiles the kernels of all steps that may come, before the first request does.

Triton compiles a kernel when it is first launched, which takes half a second and holds up all that runs. What
it compiles for is kept to a few kinds (ops/gpu_launch.py): a model's sizes, the forms of LoRA and two numbers
of chunks. One small forward of each kind is enough; what they write goes to a page of the cache that no
sequence owns, and no adapter has part in them.
"""

from collections.abc import Iterator

import torch

from toppings.adapters.device_pool import DevicePool
from toppings.core import BatchItem, Request
from toppings.engine.device_lora import DeviceLora
from toppings.engine.graphs import GROUP_SETS, GraphSpec
from toppings.engine.pages import pages_for
from toppings.engine.step_inputs import InputBuilder
from toppings.model.decoder import Decoder
from toppings.ops.attention import KVCache
from toppings.ops.gpu_launch import chunk_room, next_power_of_2
from toppings.ops.gpu_plan import TILES, LoraBatch
from toppings.ops.lora import MAX_RANK, LoraForm, LoraSegments
from toppings.sampling_params import SamplingParams


@torch.inference_mode()
def compile_steps(
    decoder: Decoder, cache: KVCache, pool: DevicePool, inputs: InputBuilder, spec: GraphSpec
) -> None:
    """Every kind of step of such a size runs once."""
    # A decode, a whole prompt, which torch's attention may serve, and a later chunk.
    for queries in [(1, 2), (2, 2), (2, 4)]:
        _run(decoder, cache, pool, inputs, spec, [queries], None)
    for form, num_chunks in _lora_kinds(spec):
        _run(decoder, cache, pool, inputs, spec, [(1, 2)], (form, num_chunks))


def _lora_kinds(spec: GraphSpec) -> Iterator[tuple[LoraForm, int]]:
    """Forms with numbers of chunks, one for each number of them that kernels are compiled for."""
    forms: dict[LoraForm, None] = dict.fromkeys(("sgmv", spec.decode_form))
    for form in forms:
        most = spec.max_num_tokens // TILES[form].rows + spec.max_num_seqs
        yield from ((form, room) for room in sorted({chunk_room(n) for n in _powers_of_2(most)}))


def _powers_of_2(most: int) -> Iterator[int]:
    """1, 2, 4 … up to the first that is `most` at least."""
    return (1 << i for i in range(next_power_of_2(most).bit_length()))


def _run(
    decoder: Decoder,
    cache: KVCache,
    pool: DevicePool,
    inputs: InputBuilder,
    spec: GraphSpec,
    queries: list[tuple[int, int]],
    lora_kind: tuple[LoraForm, int] | None,
) -> None:
    """One forward of sequences with (queries, context) tokens each."""
    built = inputs.build([_item(spec, cache.page_size, *each) for each in queries], [0], None)
    lora = None
    if lora_kind is not None:
        form, num_chunks = lora_kind
        chunks = torch.tensor([[0, 0, -1]] * num_chunks, dtype=torch.int32).to(decoder.device)
        segments = LoraSegments([0, len(built.token_ids)], [-1])
        segments.batches[chunks.device] = LoraBatch(chunks, form, MAX_RANK)
        lora = DeviceLora(pool, segments, spec.out_offsets, GROUP_SETS[-1], adjusts=True)
    decoder.forward(built.token_ids, built.positions, cache, built.meta, built.logit_rows, lora)


def _item(spec: GraphSpec, page_size: int, num_queries: int, context: int) -> BatchItem:
    """The last `num_queries` of `context` tokens."""
    request = Request("compile", [0] * context, SamplingParams(), num_computed_tokens=context - num_queries)
    request.page_table = [spec.scratch_page] * pages_for(context, page_size)
    return BatchItem(request, num_queries)
