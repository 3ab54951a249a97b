"""The decoder of all supported families: pre-norm attention and gated feed-forward layers with rotary
positions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from toppings.model.config import ModelConfig
from toppings.model.weights import read_weights
from toppings.ops.activation import silu_mul
from toppings.ops.attention import AttentionMetadata, KVCache, paged_attention
from toppings.ops.linear import Linear, QuantizedLinear
from toppings.ops.norm import add_rms_norm_, rms_norm
from toppings.ops.quantized import BITS, quantize
from toppings.ops.rope import HeadNorm, Rope, rotate_and_store_


class LoraContext(Protocol):
    """What adds the adapters' part to each projection group's output."""

    def start(self, layer: int, group: str, x: Tensor) -> None:
        """Called before the group's base product; never blocks. x: [T, in], not changed until `finish`."""

    def finish(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        """Adds the adapters' part to y [T, Σ out] in place."""


class OwnLayers(Protocol):
    """What adapters have of their own outside the projections; each call changes their rows in place."""

    def embed(self, token_ids: Tensor, x: Tensor) -> None:
        """x: [T, hidden], the tokens' embeddings."""

    def norm(self, layer: int, name: str, residual: Tensor, x: Tensor, eps: float) -> None:
        """x: [T, hidden], the norm of `residual`; called before the layer that reads it."""

    def last_norm(self, residual: Tensor, x: Tensor, eps: float) -> None:
        """`norm`, of the rows that are returned."""

    def head_norms(self, layer: int, num_rows: int, base: HeadNorm) -> list[tuple[slice, HeadNorm]]:
        """Norms of queries and keys of all rows, cut where they change."""


_HEAD_BITS = 8
"""Of the output layer of a quantised model: logits come straight from it (4 bits there were not measured)."""


def _linear(weight: Tensor, bias: Tensor | None, bits: int | None) -> Linear | QuantizedLinear:
    return Linear(weight, bias) if bits is None else QuantizedLinear(quantize(weight, bits), bias)


@dataclass(frozen=True)
class _Layer:
    input_norm: Tensor
    projections: dict[str, Linear | QuantizedLinear]  # by projection group
    head_norm: HeadNorm | None
    post_attention_norm: Tensor
    sliding_window: int | None

    @classmethod
    def take(cls, weights: dict[str, Tensor], layer: int, config: ModelConfig, bits: int | None) -> "_Layer":
        """Moves the layer's tensors out of `weights`, so that packing never holds two copies of more than
        one."""
        take, prefix = weights.pop, f"layers.{layer}."
        head_norm = None
        if config.has_head_norm:
            head_norm = HeadNorm(take(prefix + "q_norm"), take(prefix + "k_norm"), config.rms_norm_eps)
        return cls(
            take(prefix + "input_layernorm"),
            {
                group: _linear(
                    take(f"{prefix}{group}.weight"), weights.pop(f"{prefix}{group}.bias", None), bits
                )
                for group in ("qkv", "o", "gate_up", "down")
            },
            head_norm,
            take(prefix + "post_attention_layernorm"),
            config.sliding_windows[layer],
        )


@dataclass(frozen=True)
class _Step:
    """What every layer of one forward pass shares."""

    cos: Tensor
    sin: Tensor
    cache: KVCache
    meta: AttentionMetadata
    lora: LoraContext | None
    own: OwnLayers | None


class Decoder:
    """A base model on one device. Without state of its own between calls: keys and values live in the
    cache."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, Tensor], *, quantization: str = "none"
    ) -> None:
        """`weights` as `read_weights` names them, all on the device; they are moved out of the mapping.

        `quantization`: "int8" or "int4" (in host memory) keeps projections so, layer by layer, and the output
        layer in int8; embedding, norms and biases stay. Raises ValueError as `quantize`."""
        self.config = config
        bits = BITS[quantization]
        self._embed = weights.pop("embed")
        self._layers = [_Layer.take(weights, layer, config, bits) for layer in range(config.num_layers)]
        self._norm = weights.pop("norm")
        head = weights.pop("lm_head", None)  # a tied one may be stored, too, and then counts where it differs
        assert head is not None or config.tie_word_embeddings
        head_bits = None if bits is None else _HEAD_BITS
        self._lm_head = _linear(self._embed if head is None else head, None, head_bits)
        frequencies = torch.tensor(config.inverse_frequencies, device=self._embed.device)
        self._rope = Rope(frequencies, config.rope_scaling)
        assert not weights, list(weights)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        quantization: str = "none",
    ) -> "Decoder":
        """Reads a checkpoint directory; `dtype` "auto" is the checkpoint's own, or its name, such as
        "bfloat16".

        Raises ValueError as `ModelConfig.from_checkpoint`, `read_weights` and `quantize`.
        """
        config = ModelConfig.from_checkpoint(path)
        name = config.dtype if dtype == "auto" else dtype
        weights = read_weights(path, config, getattr(torch, name) if isinstance(name, str) else name)
        weights = {name: weight.to(device) for name, weight in weights.items()}
        return cls(config, weights, quantization=quantization)

    @property
    def dtype(self) -> torch.dtype:
        return self._embed.dtype

    @property
    def device(self) -> torch.device:
        return self._embed.device

    def has_kernels(self, num_rows: int) -> bool:
        """Products of 1 to `num_rows` rows are kernels of ours."""
        projections = (each for layer in self._layers for each in layer.projections.values())
        return all(each.has_kernel(num_rows) for each in (*projections, self._lm_head))

    @torch.inference_mode()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        meta: AttentionMetadata,
        logit_rows: Tensor,
        lora: LoraContext | None = None,
    ) -> Tensor:
        """One step: as `hidden`, but returns the rows' logits, fp32 [R, vocab]."""
        return self.logits(self.hidden(input_ids, positions, cache, meta, logit_rows, lora))

    @torch.inference_mode()
    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        meta: AttentionMetadata,
        rows: Tensor,
        lora: LoraContext | None = None,
        own: OwnLayers | None = None,
    ) -> Tensor:
        """One step: writes the tokens' keys and values to the cache, returns final hidden states, normalised
        as the output layer reads them, [R, hidden] of the model's dtype.

        input_ids, positions: int64 [T], rows as `meta` groups them; rows: int64 [R], those to return.
        """
        step, eps = _Step(*self._rope.cos_sin(positions), cache, meta, lora, own), self.config.rms_norm_eps
        residual = functional.embedding(input_ids, self._embed)
        if own is not None:
            own.embed(input_ids, residual)
        x = rms_norm(residual, self._layers[0].input_norm, eps)
        for index, layer in enumerate(self._layers):
            if own is not None:
                own.norm(index, "input_layernorm", residual, x, eps)
            x = self._attend(step, index, layer, x)
            x = add_rms_norm_(x, residual, layer.post_attention_norm, eps)
            if own is not None:
                own.norm(index, "post_attention_layernorm", residual, x, eps)
            x = self._project(step, index, "down", silu_mul(self._project(step, index, "gate_up", x)))
            if index + 1 < len(self._layers):
                following = self._layers[index + 1].input_norm
                x = add_rms_norm_(x, residual, following, eps)
        x, residual = x[rows], residual[rows]
        x = add_rms_norm_(x, residual, self._norm, eps)
        if own is not None:
            own.last_norm(residual, x, eps)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor, start: int = 0) -> Tensor:
        """fp32 [R, vocab] of rows that `hidden` returned, whichever they are."""
        return self._lm_head(hidden, is_wide=True)  # rounded to bfloat16, likely tokens would often be equals

    def _attend(self, step: _Step, index: int, layer: _Layer, x: Tensor) -> Tensor:
        config, cache = self.config, step.cache
        qkv = self._project(step, index, "qkv", x)
        k_cache, v_cache = cache.k[index], cache.v[index]
        self._rotate_and_store(step, index, layer, qkv)
        heads = qkv.view(qkv.shape[0], -1, config.head_dim)
        q, k, v = heads.tensor_split((config.num_heads, config.num_heads + config.num_kv_heads), dim=1)
        x = paged_attention(
            q,
            k,
            v,
            k_cache,
            v_cache,
            step.meta,
            scale=config.head_dim**-0.5,
            sliding_window=layer.sliding_window,
        )
        return self._project(step, index, "o", x)

    def _rotate_and_store(self, step: _Step, index: int, layer: _Layer, qkv: Tensor) -> None:
        k_cache, v_cache, slots = step.cache.k[index], step.cache.v[index], step.meta.slot_mapping
        if step.own is None or layer.head_norm is None:
            rotate_and_store_(qkv, step.cos, step.sin, k_cache, v_cache, slots, layer.head_norm)
            return
        for rows, norm in step.own.head_norms(index, qkv.shape[0], layer.head_norm):
            rotate_and_store_(qkv[rows], step.cos[rows], step.sin[rows], k_cache, v_cache, slots[rows], norm)

    def _project(self, step: _Step, index: int, group: str, x: Tensor) -> Tensor:
        """The group's base product with the adapters' part added."""
        if step.lora is None:
            return self._layers[index].projections[group](x)
        step.lora.start(index, group, x)
        y = self._layers[index].projections[group](x)
        step.lora.finish(index, group, x, y)
        return y
