"""The oracle: small random checkpoints made by transformers and PEFT, and what these two answer with them."""

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB_SIZE = 320
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "llama3-scaled": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"sliding_window": 24},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {
        "head_dim": 24,
        "query_pre_attn_scalar": 30,
        "sliding_window": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 24,
        "query_pre_attn_scalar": 30,
        "sliding_window": 24,
        "sliding_window_pattern": 2,
    },
    "phi3": {
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    },
    "olmo2": {},
    "olmo3": {
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.1,
        "logits_scaling": 0.5,
    },
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "head_dim": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 24,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
    "smollm3": {"pad_token_id": 0, "no_rope_layer_interval": 2},
}


FUSED_LINEAR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def all_linear(family: str) -> tuple[str, ...]:
    """The projections by the names that the family's checkpoints have for them."""
    if family in ("mixtral", "qwen3_moe", "gpt_oss"):  # experts' are no modules
        return ALL_LINEAR[:4]
    return FUSED_LINEAR if family == "phi3" else ALL_LINEAR


def make_model(path: Path, family: str = "llama", **overrides: Any) -> Path:
    """A random checkpoint of about 200,000 parameters in fp32 (`dtype` overrides)."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **deepcopy(FAMILIES[family]),  # transformers changes what it is given
        **overrides,
    }
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    config = AutoConfig.for_model(settings.pop("model_type", family), **settings)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in model.named_parameters():  # sharper than the default, so that greedy tokens vary
        if parameter.dim() > 1 or name.endswith(".bias"):
            parameter.data.normal_(0, 0.15)
        elif name.endswith(".sinks"):
            parameter.data.normal_(0, 2)
        elif family.startswith("gemma") and "post_" in name:  # else the embedding would drown what layers add
            parameter.data.uniform_(0, 4)
    model.save_pretrained(path)
    return path


def make_adapter(
    path: Path,
    model_path: Path,
    *,
    rank: int,
    targets: tuple[str, ...] = ALL_LINEAR,
    seed: int = 0,
    **config: Any,
) -> Path:
    """A random adapter whose effect is large enough to change greedy tokens."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    lora = LoraConfig(r=rank, target_modules=list(targets), **{"lora_alpha": 2 * rank, **config})
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.4 / rank**0.5 if "lora_B" in name else 0.1)
    model.save_pretrained(path)
    return path


def make_kind(path: Path, model_path: Path, config: Any, *, seed: int = 0, num_added: int = 0) -> Path:
    """An adapter of the kind that PEFT's `config` names."""
    random_peft(model_path, config, seed=seed, num_added=num_added).save_pretrained(path)
    return path


def random_peft(model_path: Path, config: Any, *, seed: int, num_added: int = 0) -> Any:
    """PEFT's model with random weights of a visible effect; `num_added` tokens more than the base model."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    if num_added:
        num_base = base.config.vocab_size
        base.resize_token_embeddings(num_base + num_added, mean_resizing=False)
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            layer.weight.data[num_base:].normal_(0, 0.3)  # likelier than others, to be drawn at all
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
        elif getattr(config, "init_lora_weights", None) in ("pissa", "olora"):
            parameter.data += (
                0.1 * parameter.data.std() * torch.randn_like(parameter) * parameter.requires_grad
            )
        elif parameter.requires_grad and any(kind in name for kind in ("lora_", "hada_", "lokr_")):
            parameter.data.normal_(0, 0.3)
        elif parameter.requires_grad:
            parameter.data += 0.4 * torch.randn_like(parameter)
    return model


@lru_cache(maxsize=32)
def reference_model(model_path: Path, adapter_path: Path | None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    if adapter_path is not None and (num_tokens := _num_tokens(adapter_path)) > model.config.vocab_size:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    return (model if adapter_path is None else PeftModel.from_pretrained(model, adapter_path)).eval()


def _num_tokens(adapter_path: Path) -> int:
    """Rows of the embedding that an adapter has saved."""
    with safe_open(adapter_path / "adapter_model.safetensors", "pt") as file:
        names = [name for name in list(file.keys()) if "embed_tokens" in name and name.endswith(".weight")]
        return max((int(file.get_slice(name).get_shape()[0]) for name in names), default=0)


def reference_tokens(
    model_path: Path, adapter_path: Path | None, prompt: list[int], num_tokens: int
) -> list[int]:
    """Greedy tokens of transformers + PEFT, past the end of sequence if need be."""
    return list(_reference_tokens(model_path, adapter_path, tuple(prompt), num_tokens))


@lru_cache(maxsize=1024)
def _reference_tokens(
    model_path: Path, adapter_path: Path | None, prompt: tuple[int, ...], num_tokens: int
) -> list[int]:
    model = reference_model(model_path, adapter_path)
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def make_prompt(seed: int, num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (num_tokens,), generator=generator).tolist()
