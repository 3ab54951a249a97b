"""The decoder of all supported families: attention with rotary positions and gated feed-forward layers, in
turn added to the residual; what differs between families is data (`families.py`)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from toppings.model.config import ModelConfig
from toppings.model.projections import HEAD_BITS, activation, experts
from toppings.model.weights import read_quantized, read_weights
from toppings.ops.attention import AttentionMetadata, KVCache, paged_attention
from toppings.ops.experts import ExpertLora, Experts
from toppings.ops.linear import Linear, QuantizedLinear, linear
from toppings.ops.norm import add_rms_norm_, rms_norm
from toppings.ops.quantized import BITS, QuantizedWeight
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

    def norm(self, layer: int, name: str, source: Tensor, x: Tensor, norm: "RmsNorm") -> None:
        """x: [T, hidden], the norm of `source`; called before what reads it."""

    def last_norm(self, source: Tensor, x: Tensor, norm: "RmsNorm") -> None:
        """`norm`, of the rows that are returned."""

    def head_norms(self, layer: int, num_rows: int, base: HeadNorm) -> list[tuple[slice, HeadNorm]]:
        """Norms of queries and keys of all rows, cut where they change."""


class StepExpertLora(Protocol):
    """What adapters have on experts and routers."""

    def of_layer(self, layer: int) -> ExpertLora: ...


@dataclass(frozen=True)
class RmsNorm:
    """x / sqrt(mean(x²) + eps) · (base + weight); `name` is the checkpoint's."""

    name: str
    weight: Tensor
    eps: float
    base: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.base)

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x in place, then its norm."""
        return add_rms_norm_(x, residual, self.weight, self.eps, self.base)


@dataclass(frozen=True)
class _Layer:
    norms: tuple[RmsNorm | None, ...]  # as `families.Norms` orders them
    projections: dict[str, Linear | QuantizedLinear]  # by projection group
    head_norm: HeadNorm | None
    sliding_window: int | None
    sinks: Tensor | None  # fp32 [heads]
    rope: int  # which of the model's
    experts: Experts | None  # in the place of the groups gate_up and down

    @classmethod
    def take(
        cls,
        weights: dict[str, Tensor],
        quantized: Mapping[str, QuantizedWeight],
        layer: int,
        config: ModelConfig,
        bits: int | None,
    ) -> "_Layer":
        """Moves the layer's tensors out of `weights`, so that packing never holds two copies of more than
        one."""

        def of(name: str) -> Tensor | QuantizedWeight:
            return kept if (kept := quantized.get(name)) is not None else take(name)

        take, prefix = weights.pop, f"layers.{layer}."
        head_norm, form = None, (config.rms_norm_eps, config.norm_base)
        if config.qk_norm:
            is_whole = config.qk_norm == "whole"
            head_norm = HeadNorm(take(prefix + "q_norm"), take(prefix + "k_norm"), *form, is_whole)
        return cls(
            tuple(
                None if name is None else RmsNorm(name, take(prefix + name), *form) for name in config.norms
            ),
            {
                group: linear(of(f"{prefix}{group}.weight"), weights.pop(f"{prefix}{group}.bias", None), bits)
                for group in (("qkv", "o") if config.has_experts else ("qkv", "o", "gate_up", "down"))
            },
            head_norm,
            config.sliding_windows[layer],
            take(prefix + "sinks").float() if config.has_sinks else None,
            config.ropes.of_layer[layer],
            experts(of, prefix, config, bits) if config.has_experts else None,
        )


@dataclass(frozen=True)
class _Step:
    """What every layer of one forward pass shares."""

    turns: list[tuple[Tensor, Tensor]]  # cosines and sines of each of the model's ropes
    cache: KVCache
    meta: AttentionMetadata
    lora: LoraContext | None
    own: OwnLayers | None
    experts: StepExpertLora | None


class Decoder:
    """A base model on one device. Without state of its own between calls: keys and values live in the
    cache."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        *,
        quantized: Mapping[str, QuantizedWeight] | None = None,
        quantization: str = "none",
    ) -> None:
        """`weights` as `read_weights` names them, all on the device; they are moved out of the mapping. Those
        in `quantized` (in host memory) are served as they are.

        `quantization`: "int8" or "int4" (in host memory) keeps the other projections so, layer by layer, and
        the output layer in int8; embedding, norms and biases stay. Raises ValueError as `quantize`."""
        self.config = config
        bits, quantized = BITS[quantization], quantized or {}
        self._embed = weights.pop("embed")
        self._layers = [
            _Layer.take(weights, quantized, layer, config, bits) for layer in range(config.num_layers)
        ]
        self._norm = RmsNorm("norm", weights.pop("norm"), config.rms_norm_eps, config.norm_base)
        self._gate = activation(config)
        # A tied one may be stored, too, and then counts where it differs.
        head = quantized.get("lm_head", weights.pop("lm_head", None))
        assert head is not None or config.tie_word_embeddings
        head_bits = None if bits is None else HEAD_BITS
        self._lm_head = linear(self._embed if head is None else head, None, head_bits)
        self._ropes = [
            Rope(torch.tensor(table.frequencies, device=self._embed.device), table.scaling)
            for table in config.ropes.tables
        ]
        self._embedding_multiplier = config.embedding_multiplier
        if config.rounds_multiplier:
            self._embedding_multiplier = torch.tensor(config.embedding_multiplier, dtype=self.dtype).item()
        assert not weights, list(weights)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        config: ModelConfig | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        quantization: str = "none",
    ) -> "Decoder":
        """Reads a checkpoint directory, whose configuration may be known; `dtype` "auto" is the checkpoint's
        own, or its name, such as "bfloat16".

        In host memory, what the checkpoint has in 8 or 4 bits stays so where the forms for such hold it.
        Raises ValueError as `ModelConfig.from_checkpoint`, `read_weights` and `quantize`.
        """
        config = config or ModelConfig.from_checkpoint(path)
        name = config.dtype if dtype == "auto" else dtype
        kind: torch.dtype = getattr(torch, name) if isinstance(name, str) else name
        is_on_host = torch.device(device).type == "cpu"
        quantized = read_quantized(path, config, kind) if is_on_host else {}
        weights = read_weights(path, config, kind, without=quantized)
        weights = {name: weight.to(device) for name, weight in weights.items()}
        return cls(config, weights, quantized=quantized, quantization=quantization)

    @property
    def dtype(self) -> torch.dtype:
        return self._embed.dtype

    @property
    def device(self) -> torch.device:
        return self._embed.device

    def has_kernels(self, num_rows: int) -> bool:
        """All of a step of 1 to `num_rows` rows is kernels of ours, whatever the rows hold: which experts are
        asked for is looked at on the host."""
        return not self.config.has_experts and all(each.has_kernel(num_rows) for each in self.products())

    def quantized_kinds(self) -> list[QuantizedLinear]:
        """A product of each kind of weights with 8 or 4 bits."""
        products = (each for each in self.products() if isinstance(each, QuantizedLinear))
        return list({(each.weight.bits, each.weight.scales.dtype): each for each in products}.values())

    def products(self) -> Iterator[Linear | QuantizedLinear]:
        """Of all layers, and the output layer's; not those of experts on a GPU."""
        for layer in self._layers:
            yield from layer.projections.values()
            if layer.experts is not None:
                yield from (*layer.experts.gate_up.linears, *layer.experts.down.linears)
        yield self._lm_head

    def projection(self, layer: int, group: str) -> Linear | QuantizedLinear:
        """The base weights of a projection group; groups that experts stand for have none."""
        return self._layers[layer].projections[group]

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
        experts: StepExpertLora | None = None,
    ) -> Tensor:
        """One step: writes the tokens' keys and values to the cache, returns final hidden states, normalised
        as the output layer reads them, [R, hidden] of the model's dtype.

        input_ids, positions: int64 [T], rows as `meta` groups them; rows: int64 [R], those to return.
        """
        turns = [rope.cos_sin(positions) for rope in self._ropes]
        step, residual = _Step(turns, cache, meta, lora, own, experts), self._embed_tokens(input_ids, own)
        x: Tensor | None = None
        for index, layer in enumerate(self._layers):
            attention_in, attention_out, mlp_in, mlp_out = layer.norms
            x = self._enter(step, index, attention_in, residual, x)
            x = self._leave(step, index, attention_out, self._attend(step, index, layer, x))
            x = self._enter(step, index, mlp_in, residual, x)
            x = self._leave(step, index, mlp_out, self._feed_forward(step, index, layer, x))
        assert x is not None
        x, residual = x[rows], residual[rows]
        x = self._norm.add_(self._scaled(x), residual)
        if own is not None:
            own.last_norm(residual, x, self._norm)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor, start: int = 0) -> Tensor:
        """fp32 [R, vocab] of rows that `hidden` returned, whichever they are."""
        return self.finish_logits_(self.head(hidden))

    def head(self, hidden: Tensor) -> Tensor:
        """The output layer's product, fp32 [R, vocab]."""
        return self._lm_head(hidden, is_wide=True)  # rounded to bfloat16, likely tokens would often be equals

    def finish_logits_(self, logits: Tensor) -> Tensor:
        """What the family makes of the output layer's product, in place."""
        if self.config.logits_divisor != 1.0:
            logits.div_(self.config.logits_divisor)
        if cap := self.config.logits_softcap:
            logits.div_(cap).tanh_().mul_(cap)
        return logits

    def _embed_tokens(self, input_ids: Tensor, own: OwnLayers | None) -> Tensor:
        # An adapter's own tokens have rows of its own.
        known = input_ids if own is None else input_ids.clamp(max=self._embed.shape[0] - 1)
        x = functional.embedding(known, self._embed)
        if own is not None:
            own.embed(input_ids, x)
        return x if self._embedding_multiplier == 1.0 else x.mul_(self._embedding_multiplier)

    def _enter(
        self, step: _Step, index: int, norm: RmsNorm | None, residual: Tensor, x: Tensor | None
    ) -> Tensor:
        """What a block reads: the residual, to which what the block before computed is added, or its norm."""
        if norm is None:
            return residual if x is None else residual.add_(self._scaled(x))
        x = norm(residual) if x is None else norm.add_(self._scaled(x), residual)
        if step.own is not None:
            step.own.norm(index, norm.name, residual, x, norm)
        return x

    def _leave(self, step: _Step, index: int, norm: RmsNorm | None, x: Tensor) -> Tensor:
        """What is added to the residual of what a block computed."""
        if norm is None:
            return x
        y = norm(x)
        if step.own is not None:
            step.own.norm(index, norm.name, x, y, norm)
        return y

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.config.residual_multiplier == 1.0 else x.mul_(self.config.residual_multiplier)

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
            scale=config.attention_scale,
            sliding_window=layer.sliding_window,
            softcap=config.attention_softcap,
            sinks=layer.sinks,
        )
        return self._project(step, index, "o", x)

    def _feed_forward(self, step: _Step, index: int, layer: _Layer, x: Tensor) -> Tensor:
        if layer.experts is not None:
            return layer.experts(x, None if step.experts is None else step.experts.of_layer(index))
        return self._project(step, index, "down", self._gate(self._project(step, index, "gate_up", x)))

    def _rotate_and_store(self, step: _Step, index: int, layer: _Layer, qkv: Tensor) -> None:
        k_cache, v_cache, slots = step.cache.k[index], step.cache.v[index], step.meta.slot_mapping
        cos, sin = step.turns[layer.rope]
        if step.own is None or layer.head_norm is None:
            rotate_and_store_(qkv, cos, sin, k_cache, v_cache, slots, layer.head_norm)
            return
        for rows, norm in step.own.head_norms(index, qkv.shape[0], layer.head_norm):
            rotate_and_store_(qkv[rows], cos[rows], sin[rows], k_cache, v_cache, slots[rows], norm)

    def _project(self, step: _Step, index: int, group: str, x: Tensor) -> Tensor:
        """The group's base product with the adapters' part added."""
        if step.lora is None:
            return self._layers[index].projections[group](x)
        step.lora.start(index, group, x)
        y = self._layers[index].projections[group](x)
        step.lora.finish(index, group, x, y)
        return y
