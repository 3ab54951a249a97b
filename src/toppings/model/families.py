"""The supported architectures: what transformers' class for each does, as data, and which fields of
config.json it heeds. `docs/adding-a-model.md` shows how one is added."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from toppings.core import ExpertNames, stored_modules


class Norms(NamedTuple):
    """A layer's norms by the names that the checkpoint gives them; None where there is none.

    h = x + attention_out(attention(attention_in(x))); y = h + mlp_out(mlp(mlp_in(h))).
    """

    attention_in: str | None = "input_layernorm"
    attention_out: str | None = None
    mlp_in: str | None = "post_attention_layernorm"
    mlp_out: str | None = None


MIXTRAL_EXPERTS = ExpertNames(
    "block_sparse_moe.gate",
    "block_sparse_moe.experts.{}.w1",
    "block_sparse_moe.experts.{}.w3",
    "block_sparse_moe.experts.{}.w2",
)
STACKED_EXPERTS = ExpertNames(
    "mlp.router",
    gate="mlp.experts.gate_up_proj",
    up="mlp.experts.gate_up_proj",
    down="mlp.experts.down_proj",
    are_stacked=True,
    router_parameter="mlp.router.weight",
)
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
    by layer type) or "no_rope_layers" (some layers have none). `experts`: they stand in the place of the
    feed-forward layer. `activation_field`: "" where the class heeds none.
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
    experts: ExpertNames | None = None


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


def _mixtral(source: Any) -> dict[str, Any]:
    return _experts(source, source.num_local_experts, source.intermediate_size, is_normalised=True)


def _qwen3_moe(source: Any) -> dict[str, Any]:
    if source.mlp_only_layers or source.decoder_sparse_step != 1:
        raise ValueError(
            f"mlp_only_layers is {source.mlp_only_layers!r:.200} and decoder_sparse_step is "
            f"{source.decoder_sparse_step!r}; only models with experts in all layers are supported"
        )
    is_normalised = bool(source.norm_topk_prob)
    return _experts(
        source, source.num_local_experts, source.moe_intermediate_size, is_normalised=is_normalised
    )


def _experts(source: Any, num_experts: Any, size: Any, *, is_normalised: bool) -> dict[str, Any]:
    top_k = source.num_experts_per_tok
    for name, value in (("number of experts", num_experts), ("experts' intermediate size", size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"the {name} is {value!r}; it must be a whole number of at least 1")
    if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise ValueError(f"num_experts_per_tok is {top_k!r}; it must be from 1 to {num_experts}")
    return {
        "num_experts": num_experts,
        "num_experts_per_token": top_k,
        "intermediate_size": size,
        "are_routes_normalised": is_normalised,
    }


def _gpt_oss(source: Any) -> dict[str, Any]:
    alpha, limit = source.swiglu_alpha, source.swiglu_limit
    for name, value in (("swiglu_alpha", alpha), ("swiglu_limit", limit)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}; it must be a number above 0")
    swiglu = float(alpha), float(limit)
    return {**_mixtral(source), "has_expert_bias": True, "has_sinks": True, "swiglu": swiglu}


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
    "MixtralForCausalLM": Family("mixtral", has_window=True, numbers=_mixtral, experts=MIXTRAL_EXPERTS),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        qk_norm="head",
        has_window=True,
        heeds_attention_bias=True,
        numbers=_qwen3_moe,
        experts=ExpertNames(),
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        has_window=True,
        heeds_attention_bias=True,
        heeds_layer_types=True,
        activation_field="",
        numbers=_gpt_oss,
        experts=STACKED_EXPERTS,
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        has_window=True,
        heeds_attention_bias=True,
        heeds_mlp_bias=True,
        heeds_layer_types=True,
        rotary="no_rope_layers",
    ),
}


def modules_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """`core.stored_modules` of the model that has this config.json."""
    named = config.get("architectures")
    family = FAMILIES.get(str(named[0])) if isinstance(named, list) and named else None
    return stored_modules(
        is_fused=family is not None and family.is_fused,
        has_experts=family is not None and family.experts is not None,
    )


LAYER_TYPES = ("full_attention", "sliding_attention")
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
"""Those of `ops.activation`."""
