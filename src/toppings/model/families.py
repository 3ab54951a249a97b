"""The supported architectures: what transformers' class for each does, as data, and which fields of
config.json it heeds. `docs/adding-a-model.md` shows how one is added."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Norms(NamedTuple):
    """A layer's norms by the names that the checkpoint gives them; None where there is none.

    h = x + attention_out(attention(attention_in(x))); y = h + mlp_out(mlp(mlp_in(h))).
    """

    attention_in: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None


PRE = Norms()
SANDWICH = Norms(
    attention_out="post_attention_layernorm",
    mlp_in="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)
POST = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


def _nothing(source: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Family:
    """`qk_norm`: of queries and keys before rotation, of each "head" or of the "whole" projection; "": none.
    `norm_base` is added to the weights of all norms. `numbers`: fields of `ModelConfig` that config.json says
    and that other families have not. `is_fused`: the checkpoint has `qkv_proj` and `gate_up_proj`, which
    adapters target. `rotary`: "plain", "partial" (a part of each head may be turned), "by_type" (frequencies
    by layer type) or "no_rope_layers" (some layers have none).
    """

    model_type: str
    qkv_bias: bool = False
    qk_norm: str = ""
    has_window: bool = False
    heeds_attention_bias: bool = False
    heeds_mlp_bias: bool = False
    heeds_layer_types: bool = False
    activation_field: str = "hidden_act"
    norms: Norms = PRE
    norm_base: float = 0.0
    numbers: Callable[[Any], dict[str, Any]] = _nothing
    is_fused: bool = False
    rotary: str = "plain"


def _gemma(source: Any) -> dict[str, Any]:
    if source.use_bidirectional_attention:
        raise ValueError("use_bidirectional_attention is set; only causal attention is supported")
    return {
        "embedding_multiplier": source.hidden_size**0.5,
        "rounds_multiplier": True,
        "attention_scale": source.query_pre_attn_scalar**-0.5,
        "logits_softcap": source.final_logit_softcapping or 0.0,
    }


def _gemma2(source: Any) -> dict[str, Any]:
    return {**_gemma(source), "attention_softcap": source.attn_logit_softcapping or 0.0}


def _granite(source: Any) -> dict[str, Any]:
    return {
        "embedding_multiplier": source.embedding_multiplier,
        "residual_multiplier": source.residual_multiplier,
        "attention_scale": source.attention_multiplier,
        "logits_divisor": source.logits_scaling,
    }


FAMILIES = {
    "LlamaForCausalLM": Family("llama", heeds_attention_bias=True, heeds_mlp_bias=True),
    "MistralForCausalLM": Family("mistral", has_window=True),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, has_window=True, heeds_layer_types=True),
    "Qwen3ForCausalLM": Family(
        "qwen3", qk_norm="head", has_window=True, heeds_attention_bias=True, heeds_layer_types=True
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        has_window=True,
        heeds_attention_bias=True,
        heeds_layer_types=True,
        activation_field="hidden_activation",
        norms=SANDWICH,
        norm_base=1.0,
        numbers=_gemma2,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        qk_norm="head",
        has_window=True,
        heeds_attention_bias=True,
        heeds_layer_types=True,
        activation_field="hidden_activation",
        norms=SANDWICH,
        norm_base=1.0,
        numbers=_gemma,
        rotary="by_type",
    ),
    "Phi3ForCausalLM": Family("phi3", has_window=True, is_fused=True, rotary="partial"),
    "Olmo2ForCausalLM": Family("olmo2", qk_norm="whole", heeds_attention_bias=True, norms=POST),
    "Olmo3ForCausalLM": Family(
        "olmo3",
        qk_norm="whole",
        has_window=True,
        heeds_attention_bias=True,
        heeds_layer_types=True,
        norms=POST,
        rotary="by_type",
    ),
    "GraniteForCausalLM": Family("granite", heeds_attention_bias=True, heeds_mlp_bias=True, numbers=_granite),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        has_window=True,
        heeds_attention_bias=True,
        heeds_mlp_bias=True,
        heeds_layer_types=True,
        rotary="no_rope_layers",
    ),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
"""Those of `ops.activation`."""
