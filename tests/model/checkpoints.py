"""Tiny random checkpoints of every family, written by transformers, and steps through the decoder."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from toppings.model.decoder import Decoder, LoraContext
from toppings.ops.attention import AttentionMetadata, KVCache

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "original_max_position_embeddings": 40,
}
PHI_LONG_ROPE = {
    "rope_parameters": LONG_ROPE,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 1.0,
}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 30, "sliding_window": 9}
QWEN3_MOE = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
GPT_OSS = {
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 9,
    "rope_parameters": {**YARN_ROPE, "rope_theta": 150000.0, "beta_fast": 32.0, "truncate": False},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-biases": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-no-grouping": ("Llama", {"num_key_value_heads": 4, "head_dim": 24}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2-uncapped": (
        "Gemma2",
        {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "gemma3": ("Gemma3", {**GEMMA, "sliding_window_pattern": 2}),
    "gemma3-linear": (
        "Gemma3",
        {
            **GEMMA,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": ("Phi3", {"pad_token_id": 0, "sliding_window": 9}),
    "phi3-partial": (
        "Phi3",
        {
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "phi3-longrope": ("Phi3", {"pad_token_id": 0, **PHI_LONG_ROPE}),
    "olmo2": ("Olmo2", {}),
    "olmo2-yarn": ("Olmo2", {"rope_parameters": YARN_ROPE, "attention_bias": True}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": YARN_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.5,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9}),
    "qwen3-moe": ("Qwen3Moe", {**QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3-moe-plain": ("Qwen3Moe", {**QWEN3_MOE, "attention_bias": True}),
    "gpt-oss": ("GptOss", GPT_OSS),
    "gpt-oss-plain": (
        "GptOss",
        {
            **GPT_OSS,
            "attention_bias": False,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "swiglu_alpha": 1.0,
            "swiglu_limit": 0.5,
        },
    ),
    "smollm3": ("SmolLM3", {"pad_token_id": 0, "no_rope_layer_interval": 2}),
    "smollm3-window": (
        "SmolLM3",
        {
            "pad_token_id": 0,
            "no_rope_layers": [1, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 9,
            "rope_parameters": YARN_ROPE,
        },
    ),
}
PAGE_SIZE = 16
PAGES = [2, 5, 1, 7, 4, 3, 6]
"""The cache pages of the one sequence that `run` computes: not in order."""


def build(variant: str, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model whose logits are far from uniform."""
    family, changes = deepcopy(VARIANTS[variant])  # transformers changes what it is given
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**{**SHAPE, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
        elif "sinks" in name:
            parameter.data.normal_(0, 2)
        else:
            parameter.data.normal_(0, 0.15)
    return model.to(dtype)


def save(model: Any, path: Path, **options: Any) -> Path:
    model.save_pretrained(path, **options)
    return path


def new_cache(decoder: Decoder, num_pages: int = 8) -> KVCache:
    config = decoder.config
    return KVCache.allocate(
        config.num_layers,
        num_pages,
        PAGE_SIZE,
        config.num_kv_heads,
        config.head_dim,
        decoder.dtype,
        "cpu",
    )


def run(
    decoder: Decoder, ids: list[int], cuts: list[int] | None = None, lora: LoraContext | None = None
) -> Tensor:
    """Logits of every position, the sequence computed in pieces that end at `cuts` (default: whole)."""
    cache, parts, start = new_cache(decoder), [], 0
    for stop in cuts or [len(ids)]:
        positions = torch.arange(start, stop)
        slots = torch.tensor(PAGES)[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        is_decode = stop - start == 1 and start > 0
        tables = torch.tensor([PAGES], dtype=torch.int32)
        meta = AttentionMetadata(int(is_decode), [0, stop - start], [stop], tables, slots, PAGE_SIZE)
        rows = torch.arange(stop - start)
        parts.append(decoder.forward(torch.tensor(ids[start:stop]), positions, cache, meta, rows, lora))
        start = stop
    return torch.cat(parts)


@torch.inference_mode()
def reference_logits(model: Any, ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([ids])).logits[0].float()
    return logits
