"""What a checkpoint's config.json says, in the one form that the decoder understands."""

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from toppings.core import GROUPS
from toppings.model.files import read_generation_config, read_json, stored_float_dtype
from toppings.model.remembered import remembered

logger = logging.getLogger(__name__)

FORM = "1"
"""Another one makes anew what is remembered of configurations."""


@dataclass(frozen=True)
class _Family:
    """What transformers' class for an architecture does, and which fields of config.json it heeds."""

    model_type: str
    qkv_bias: bool = False
    has_head_norm: bool = False
    has_window: bool = False
    heeds_attention_bias: bool = False
    heeds_mlp_bias: bool = False
    heeds_layer_types: bool = False


FAMILIES = {
    "LlamaForCausalLM": _Family("llama", heeds_attention_bias=True, heeds_mlp_bias=True),
    "MistralForCausalLM": _Family("mistral", has_window=True),
    "Qwen2ForCausalLM": _Family("qwen2", qkv_bias=True, has_window=True, heeds_layer_types=True),
    "Qwen3ForCausalLM": _Family(
        "qwen3", has_head_norm=True, has_window=True, heeds_attention_bias=True, heeds_layer_types=True
    ),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
DTYPE_NAMES = ("bfloat16", "float16", "float32")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A base model's shape. `sliding_windows` has one entry per layer, None for full attention.

    `inverse_frequencies` (head_dim / 2) and `rope_scaling` are what `ops.rope.Rope` takes;
    `max_position_embeddings` counts the positions they are good for. `dtype` is the name of torch's.
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
    has_head_norm: bool
    tie_word_embeddings: bool
    sliding_windows: tuple[int | None, ...]
    inverse_frequencies: tuple[float, ...]
    rope_scaling: float
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> "ModelConfig":
        """Reads config.json and generation_config.json of a checkpoint directory; never the network.

        Raises ValueError where they are missing or describe a model that cannot be served.
        """
        path = Path(path)
        raw = read_json(path / "config.json")
        architecture = _check_served(path, raw)
        read = remembered("config", path, ["config.json"], lambda: _read(path, architecture), FORM)
        source, rope = SimpleNamespace(**read["source"]), _Rope(tuple(read["frequencies"]), read["scaling"])
        source.dtype = source.dtype or _stored_dtype(path)
        return _convert(source, rope, architecture, read_generation_config(path))

    @classmethod
    def from_transformers(cls, source: Any, architecture: str) -> "ModelConfig":
        """From a configuration object of transformers. Raises ValueError where it cannot be served."""
        return _convert(source, _rope(source), architecture, {})

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
        return sum(num_in * num_out for num_in, num_out in self.base_shapes()[1]) / (2 * self.q_size)

    def group_out_offsets(self) -> dict[str, tuple[int, ...]]:
        """Per projection group, the first column of each of its projections in the group's fused output."""
        sizes = [num_out for _, num_out in self.base_shapes()[1]]
        return {
            group: tuple(sum(sizes[modules[0] : module]) for module in modules)
            for group, modules in GROUPS.items()
        }


class _Rope(NamedTuple):
    frequencies: tuple[float, ...]
    scaling: float


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
    return {"source": source.to_dict(), **_rope(source)._asdict()}


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


def _convert(source: Any, rope: _Rope, architecture: str, generation: dict[str, Any]) -> ModelConfig:
    family = FAMILIES[architecture]
    if source.hidden_act != "silu":
        raise ValueError(f"hidden_act is {source.hidden_act!r}; only 'silu' is supported")
    has_bias = family.heeds_attention_bias and bool(source.attention_bias)
    return ModelConfig(
        architecture=architecture,
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_layers=source.num_hidden_layers,
        num_heads=source.num_attention_heads,
        num_kv_heads=source.num_key_value_heads,
        head_dim=_head_dim(source),
        rms_norm_eps=source.rms_norm_eps,
        qkv_bias=family.qkv_bias or has_bias,
        o_bias=has_bias,
        mlp_bias=family.heeds_mlp_bias and bool(source.mlp_bias),
        has_head_norm=family.has_head_norm,
        tie_word_embeddings=bool(source.tie_word_embeddings),
        sliding_windows=_windows(source, family),
        inverse_frequencies=rope.frequencies,
        rope_scaling=rope.scaling,
        max_position_embeddings=_max_positions(source),
        bos_token_id=next(iter(_ids(source, generation, "bos_token_id")), None),
        eos_token_ids=_ids(source, generation, "eos_token_id"),
        dtype=_dtype(source),
    )


def _head_dim(source: Any) -> int:
    size: int = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    return size


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
    _check_size("head_dim", head_dim := _head_dim(source))
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be even, as rotary positions turn pairs")


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


def _windows(source: Any, family: _Family) -> tuple[int | None, ...]:
    window = source.sliding_window if family.has_window else None
    if not family.heeds_layer_types:
        return (window,) * int(source.num_hidden_layers)
    kinds = source.layer_types
    if len(kinds) != source.num_hidden_layers or not set(kinds) <= set(LAYER_TYPES):
        raise ValueError(
            f"layer_types is {kinds!r:.200}; it must name {' or '.join(LAYER_TYPES)} for each of "
            f"{source.num_hidden_layers} layers"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(source: Any) -> _Rope:
    """Inverse frequencies and attention factor, by transformers' own functions, of sizes that are checked."""
    _check_sizes(source)
    parameters = source.rope_parameters
    kind = parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}; supported: {', '.join(ROPE_TYPES)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor is {parameters['partial_rotary_factor']}; only 1.0 is supported"
        )
    import torch

    if kind == "default":
        head_dim = _head_dim(source)
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return _Rope(tuple((1.0 / parameters["rope_theta"] ** exponents).tolist()), 1.0)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](source, torch.device("cpu"))
    return _Rope(tuple(frequencies.tolist()), float(scaling))


def _max_positions(source: Any) -> int:
    """How many positions the rotary frequencies reach.

    "linear" and "yarn" stretch the positions that config.json states (YaRN: the original ones) by their
    factor. "llama3" states the stretched number. "dynamic" changes its frequencies with a sequence's length
    beyond the stated number, which keys already in a cache cannot follow: it is served up to there, where it
    is plain RoPE.
    """
    parameters, stated = source.rope_parameters, int(source.max_position_embeddings)
    if parameters["rope_type"] == "linear":
        return int(stated * parameters["factor"])
    if parameters["rope_type"] == "yarn":
        original = parameters.get("original_max_position_embeddings") or stated
        return max(stated, int(original * parameters["factor"]))
    return stated
