"""How much of a GPU's memory the key-value cache may take: what weights, adapters and a step leave of it."""

from dataclasses import dataclass
from typing import Any

import torch

from toppings.config import ConfigError, EngineConfig
from toppings.core import GROUPS, BatchItem, Request
from toppings.engine.drawing import DeviceSampler
from toppings.engine.pages import pages_for
from toppings.engine.scoring import score
from toppings.engine.staging import Staging
from toppings.engine.step_inputs import InputBuilder
from toppings.model.config import ModelConfig
from toppings.model.decoder import Decoder
from toppings.ops.attention import KVCache
from toppings.ops.gpu_plan import TILES, most_splits
from toppings.ops.lora import MAX_RANK
from toppings.ops.sampling import SamplingRow
from toppings.sampling_params import MAX_LOGPROBS, SamplingParams


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one GPU: all of it, what is free once the weights are loaded, and what the largest step takes
    beside them at its peak."""

    total: int
    free: int
    activations: int

    def cache_bytes(self, *, utilization: float, pool_bytes: int) -> int:
        """What `utilization` of the device leaves for the cache, the adapters' pool not yet allocated.

        Raises ConfigError, with all of the numbers, where nothing is left.
        """
        in_use = self.total - self.free
        left = int(self.total * utilization) - in_use - self.activations - pool_bytes
        if left <= 0:
            raise ConfigError(
                f"no memory is left for the key-value cache: of {self.total} bytes, gpu_memory_utilization"
                f" {utilization:g} allows {int(self.total * utilization)}; weights and others on the GPU take"
                f" {in_use}, a step {self.activations}, adapters {pool_bytes} (device_pool_bytes):"
                f" {-left} too many"
            )
        return left


def measure(decoder: Decoder, config: EngineConfig, cuda: Any) -> DeviceMemory:
    """Runs the largest step once and looks. `cuda`: the `torch.cuda` module, or a fake."""
    cuda.empty_cache()
    before = cuda.memory_allocated()
    cuda.reset_peak_memory_stats()
    _run_largest_step(decoder, config, cuda)
    shrunk_rows = config.max_num_batched_tokens * _shrunk_row_bytes(decoder.config)
    activations = cuda.max_memory_allocated() - before + shrunk_rows + _split_bytes(decoder.config, config)
    cuda.empty_cache()
    free, total = cuda.mem_get_info()
    return DeviceMemory(total, free, activations)


def _shrunk_row_bytes(model: ModelConfig) -> int:
    """fp32, of adapters of the largest rank: a plane for each split of the input."""
    _, sizes = model.base_shapes()
    return 4 * max(
        MAX_RANK * len(modules) * TILES["sgmv"].splits(sizes[modules[0]][0]) for modules in GROUPS.values()
    )


def _split_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """fp32, what decodes of contexts as long as may be keep of each split until all are added up."""
    max_context = config.max_model_len or model.max_position_embeddings
    return 4 * most_splits(config.max_num_seqs, max_context) * model.num_heads * (model.head_dim + 2)


@torch.inference_mode()
def _run_largest_step(decoder: Decoder, config: EngineConfig, cuda: Any) -> None:
    """A prompt as long as a step may be, all of whose pages are the same one and every token of which is
    scored, and as many draws as there may be, each from the whole vocabulary."""
    model, num_tokens, num_draws = decoder.config, config.max_num_batched_tokens, config.max_num_seqs
    sizes = (model.num_layers, 1, config.page_size, model.num_kv_heads, model.head_dim)
    cache = KVCache.allocate(*sizes, decoder.dtype, decoder.device)
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=1)
    request = Request("largest-step", [0] * num_tokens, params)
    request.page_table = [0] * pages_for(num_tokens, config.page_size)
    staging = Staging(decoder.device, cuda)
    builder = InputBuilder(config.page_size, staging)
    rows = [num_tokens - 1] * num_draws + list(range(num_tokens))
    inputs = builder.build([BatchItem(request, num_tokens)], rows, None)
    hidden = decoder.hidden(inputs.token_ids, inputs.positions, cache, inputs.meta, inputs.logit_rows)
    logits = decoder.logits(hidden[:num_draws])
    score(decoder, hidden[num_draws:], inputs.token_ids, MAX_LOGPROBS)
    DeviceSampler(staging, cuda)(logits, [SamplingRow(params, [0], []) for _ in range(num_draws)]).wait()
