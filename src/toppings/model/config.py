"""What a checkpoint's config.json says, in the one form that the decoder understands."""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from toppings.core import GROUPS, ExpertNames, Mixture
from toppings.model.families import ACTIVATIONS, FAMILIES, PRE, Family, Norms
from toppings.model.files import read_generation_config, read_json, stored_float_dtype
from toppings.model.remembered import remembered
from toppings.model.ropes import Ropes, find_ropes, head_dim, layer_types

logger = logging.getLogger(__name__)

FORM = "2"
"""Another one makes anew what is remembered of configurations."""


DTYPE_NAMES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A base model's shape. `sliding_windows` has one entry per layer, None for full attention.

    `max_position_embeddings` counts the positions that `ropes` are good for. `dtype` is the name of torch's;
    `families.Family` explains `qk_norm`, `norms`, `norm_base` and `is_fused`. What layers add is multiplied
    by `residual_multiplier`; embeddings by `embedding_multiplier`, which may be rounded to their type first.
    Attention's scores are q · k times `attention_scale`, logits are divided by `logits_divisor`; a softcap c
    makes c · tanh(s / c) of either, 0 leaves them as they are. With experts, `intermediate_size` is that of
    one, and the weights of a token's add up to 1 if `are_routes_normalised`. `swiglu`: alpha and limit of
    `ops.activation.clamped_swiglu`, which then takes the place of `activation`. `has_sinks`: each head has a
    logit of its own in attention's softmax.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: str
    tie_word_embeddings: bool
    sliding_windows: tuple[int | None, ...]
    ropes: Ropes
    attention_scale: float
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    activation: str = "silu"
    norms: Norms = PRE
    norm_base: float = 0.0
    is_fused: bool = False
    embedding_multiplier: float = 1.0
    rounds_multiplier: bool = False
    residual_multiplier: float = 1.0
    attention_softcap: float = 0.0
    logits_divisor: float = 1.0
    logits_softcap: float = 0.0
    expert_names: ExpertNames | None = None
    num_experts: int = 0
    num_experts_per_token: int = 0
    are_routes_normalised: bool = False
    has_expert_bias: bool = False
    swiglu: tuple[float, float] | None = None
    has_sinks: bool = False

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> "ModelConfig":
        """Reads config.json and generation_config.json of a checkpoint directory; never the network.

        Raises ValueError where they are missing or describe a model that cannot be served.
        """
        path = Path(path)
        raw = read_json(path / "config.json")
        architecture = _check_served(path, raw)
        read = remembered("config", path, ["config.json"], lambda: _read(path, architecture), FORM)
        source = SimpleNamespace(**read["source"])
        source.dtype = source.dtype or _stored_dtype(path)
        return _convert(source, Ropes.from_json(read["ropes"]), architecture, read_generation_config(path))

    @classmethod
    def from_transformers(cls, source: Any, architecture: str) -> "ModelConfig":
        """From a configuration object of transformers. Raises ValueError where it cannot be served."""
        return _convert(source, _ropes(source, architecture), architecture, {})

    def for_length(self, max_model_len: int) -> "ModelConfig":
        """The one that serves sequences of that length, in tokens: LongRoPE has two sets of frequencies, and
        keys in the cache are of one of them."""
        long = self.ropes.long
        if long is None or max_model_len <= self.ropes.max_positions:
            return self
        return replace(self, ropes=self.ropes._replace(tables=long[0], max_positions=long[1], long=None))

    @property
    def has_experts(self) -> bool:
        return self.expert_names is not None

    @property
    def mixture(self) -> Mixture | None:
        if self.expert_names is None:
            return None
        return Mixture(self.num_experts, self.num_experts_per_token, self.expert_names)

    @property
    def max_position_embeddings(self) -> int:
        return self.ropes.max_positions

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def base_shapes(self) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Number of layers, and (in, out) of every projection in `core.MODULES` order."""
        hidden, inter = self.hidden_size, self.intermediate_size
        qkv = ((hidden, self.q_size), (hidden, self.kv_size), (hidden, self.kv_size))
        return self.num_layers, (
            *qkv,
            (self.q_size, hidden),
            (hidden, inter),
            (hidden, inter),
            (inter, hidden),
        )

    @property
    def double_cost_len(self) -> float:
        """Tokens of context with which attending to them costs a token as many FLOPs as all projections: two
        per weight there; in attention, two per query value and key, and two per value, in each layer."""
        *attention, gate, up, down = (num_in * num_out for num_in, num_out in self.base_shapes()[1])
        feed_forward = (gate + up + down) * (self.num_experts_per_token if self.has_experts else 1)
        return (sum(attention) + feed_forward) / (2 * self.q_size)

    def group_out_offsets(self) -> dict[str, tuple[int, ...]]:
        """Per projection group, the first column of each of its projections in the group's fused output."""
        sizes = [num_out for _, num_out in self.base_shapes()[1]]
        return {
            group: tuple(sum(sizes[modules[0] : module]) for module in modules)
            for group, modules in GROUPS.items()
        }


def _read(path: Path, architecture: str) -> dict[str, Any]:
    """What transformers makes of config.json: all of its fields, and the rotary frequencies."""
    from transformers import AutoConfig  # takes seconds

    try:
        source = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises its validators' own types too
        raise ValueError(f"{path / 'config.json'} is not valid: {error}") from error
    if source.model_type != (expected := FAMILIES[architecture].model_type):
        raise ValueError(
            f"{path / 'config.json'} names architecture {architecture} and model_type "
            f"{source.model_type!r}; {architecture} goes with {expected!r}"
        )
    return {"source": source.to_dict(), "ropes": _ropes(source, architecture)}


def _ropes(source: Any, architecture: str) -> Ropes:
    _check_sizes(source)
    return find_ropes(source, FAMILIES[architecture])


def _stored_dtype(path: Path) -> str | None:
    """The type that transformers takes where config.json names none: the first float's among the weights."""
    with suppress(ValueError):  # told by whoever needs the weights
        return stored_float_dtype(path)
    return None


def _check_served(path: Path, raw: dict[str, Any]) -> str:
    """The architecture's name, if it can be served as config.json describes it."""
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise ValueError(
            f"{path} has architecture {architecture!r}, which is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    if quantization := raw.get("quantization_config"):
        from toppings.model.prequantized import Scheme  # needs torch

        try:
            Scheme.of(quantization)
        except ValueError as error:
            raise ValueError(
                f"{path}: {error}; use the checkpoint that it was made from, in bfloat16, float16 or float32,"
                " on a CPU with --quantization int8 or int4"
            ) from None
    if raw.get("transformers_weights"):
        raise ValueError(f"{path} has its weights in {raw['transformers_weights']!r}, which is not supported")
    return architecture


def _convert(source: Any, ropes: Ropes, architecture: str, generation: dict[str, Any]) -> ModelConfig:
    family = FAMILIES[architecture]
    name = family.activation_field
    activation = getattr(source, name) if name else "silu"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name} is {activation!r}; supported: {', '.join(map(repr, ACTIVATIONS))}")
    has_bias = family.heeds_attention_bias and bool(source.attention_bias)
    return ModelConfig(
        architecture=architecture,
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        num_layers=source.num_hidden_layers,
        num_heads=source.num_attention_heads,
        num_kv_heads=source.num_key_value_heads,
        head_dim=head_dim(source),
        rms_norm_eps=source.rms_norm_eps,
        qkv_bias=family.qkv_bias or has_bias,
        o_bias=has_bias,
        mlp_bias=family.heeds_mlp_bias and bool(source.mlp_bias),
        qk_norm=family.qk_norm,
        tie_word_embeddings=bool(source.tie_word_embeddings),
        sliding_windows=_windows(source, family),
        ropes=ropes,
        bos_token_id=next(iter(_ids(source, generation, "bos_token_id")), None),
        eos_token_ids=_ids(source, generation, "eos_token_id"),
        dtype=_dtype(source),
        activation=activation,
        norms=family.norms,
        norm_base=family.norm_base,
        is_fused=family.is_fused,
        expert_names=family.experts,
        **{
            "intermediate_size": source.intermediate_size,
            "attention_scale": head_dim(source) ** -0.5,
            **family.numbers(source),
        },
    )


def _check_sizes(source: Any) -> None:
    sizes = {
        name: getattr(source, name)
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        )
    }
    for name, size in sizes.items():
        _check_size(name, size)
    if sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise ValueError(
            f"num_attention_heads is {sizes['num_attention_heads']}; it must be a multiple of "
            f"num_key_value_heads, {sizes['num_key_value_heads']}"
        )
    _check_size("head_dim", size := head_dim(source))
    if size % 2:
        raise ValueError(f"head_dim is {size}; it must be even, as rotary positions turn pairs")


def _check_size(name: str, size: Any) -> None:
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} is {size!r}; it must be a whole number of at least 1")


def _ids(source: Any, generation: dict[str, Any], name: str) -> tuple[int, ...]:
    """Of the generation configuration, else of config.json: a server may not do without where the first is
    silent. Ids outside the vocabulary never come and are left out."""
    value = generation.get(name)
    value = getattr(source, name) if value is None else value
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{name} is {value!r}; it must be a token id or a list of them")
    known = tuple(i for i in ids if 0 <= i < source.vocab_size)
    if len(known) < len(ids):
        logger.warning(
            "%s is %s; ids outside the vocabulary of %d are left out", name, value, source.vocab_size
        )
    return known


def _dtype(source: Any) -> str:
    name = str(source.dtype or "float32").removeprefix("torch.")
    if name not in DTYPE_NAMES:
        raise ValueError(f"dtype is {source.dtype!r}; only bfloat16, float16 and float32 are supported")
    return name


def _windows(source: Any, family: Family) -> tuple[int | None, ...]:
    window = source.sliding_window if family.has_window else None
    if not family.heeds_layer_types:
        return (window,) * int(source.num_hidden_layers)
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types(source))
