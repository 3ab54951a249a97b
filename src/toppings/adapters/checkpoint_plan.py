"""Which tensors of a PEFT checkpoint are wanted, and what they make, decided by the file's header alone."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from toppings.adapters.base_weights import BaseWeights, OpenWeights
from toppings.adapters.errors import AdapterError
from toppings.adapters.expert_plan import ExpertPlan, module_sites, parameter_sites
from toppings.adapters.folding import ProjectionWeights, check_start, fold_magnitude, fold_start
from toppings.adapters.layout import BaseShapes
from toppings.adapters.outer_plan import OUTSIDE_LAYERS, Extras, OuterPlan
from toppings.adapters.peft_config import PeftConfig, shorten
from toppings.adapters.peft_kinds import BIAS, MAGNITUDE, MAX_RANK, Target, product_rank
from toppings.adapters.peft_matches import PeftMatches
from toppings.adapters.stored_tensors import FLOATS, StoredTensor
from toppings.core import MODULES

if TYPE_CHECKING:
    import torch

_KEY = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>\d{1,6})\.(?:self_attn|mlp)\.(?P<name>\w{1,32}))"
    r"\.(?P<part>(?:lora|hada|lokr|vera)_\w{1,32})(?:\.default)?(?P<tail>\.weight|\.bias)?",
    re.ASCII,  # PEFT's own name of an adapter may stand in its keys
)
_BASE_PARAMETER = re.compile(
    r"base_model\.model\.(?:lm_head|model\.(?:embed_tokens|norm|layers\.\d+\.(?:\w+layernorm|(?:self_attn|mlp)\."
    r"(?:[qk]_norm|\w+_proj(?:\.base_layer)?)"
    r"|(?:mlp|block_sparse_moe)\.(?:(?:gate|router)(?:\.base_layer)?|experts\.\d+\.\w+))))\.(?:weight|bias)"
    r"|base_model\.model\.model\.layers\.\d+\.(?:self_attn\.sinks"
    r"|mlp\.experts\.(?:base_layer\.)*(?:gate_up|down)_proj(?:_bias)?)"
)
_OPTIONS = {MAGNITUDE: "use_dora", BIAS: "lora_bias"}
"""What of the configuration makes a tensor of a projection."""
_ADAPTER_PART = re.compile(r"lora_|hada_|lokr_|vera_")

Place = tuple[int, int]  # layer, `MODULES` index
Site = tuple[int, tuple[int, ...]]
"""A layer, and `MODULES` indices: the projections that a module of the checkpoint is made of."""


def module_name(layer: int, module: int) -> str:
    """The base model's name of a projection, as peft's patterns see it."""
    block = "mlp" if MODULES[module] in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{MODULES[module]}"


class CheckpointPlan:
    """Raises AdapterError for a file or configuration that would not give what PEFT gives."""

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        config: PeftConfig,
        shapes: BaseShapes,
        base: BaseWeights | None,
    ) -> None:
        self._sites: dict[str, Site] = {
            f"model.layers.{layer}.{name}": (layer, modules)
            for layer in range(shapes.num_layers)
            for name, modules in shapes.stored_modules.items()
        }
        self._config, self._shapes = config, shapes
        experts = (site.name for site in module_sites(shapes))
        parameters = [site.name for site in parameter_sites(shapes)]
        self._matches = PeftMatches(config, (*self._sites, *OUTSIDE_LAYERS, *experts), parameters)
        self._base = base
        self._outer = OuterPlan(stored, config, shapes.num_layers, self._matches, base)
        self._shared = {key: key for key in stored if key in config.kind.shared}
        self._experts = ExpertPlan(stored, config, shapes, self._matches)
        taken = self._shared.keys() | self._outer.taken | self._experts.taken
        others = [key for key in stored if key not in taken]
        ignored = [key for key in others if _is_ignored(key)]
        known = [key for key in others if not _is_ignored(key)]
        by_module = _by_module(known, config, shapes)
        self._keys: dict[str, dict[str, str]] = {}  # by module and part
        for name in self._sites:
            keys = by_module.get(name, {})
            if self._check(name, keys, stored):
                self._keys[name] = keys | self._shared
        self._check_base()
        self.warnings = [
            *self._outer.warnings[:20],
            *self._matches.unused_patterns()[:20],
            *map(_explain_ignored, ignored[:20]),
        ]

    @property
    def vocab_size(self) -> int:
        """The adapter's tokens; 0 where they are no more than the base model's."""
        return self._outer.vocab_size

    @property
    def keys(self) -> set[str]:
        found = self._outer.keys | self._experts.taken
        return found | {key for keys in self._keys.values() for key in keys.values()}

    def weights(self, tensors: Mapping[str, "torch.Tensor"]) -> tuple[dict[Place, ProjectionWeights], Extras]:
        """Of projections, and what is outside them. Raises AdapterError for values that are not finite."""
        for key, tensor in tensors.items():
            if not is_finite(tensor):
                raise AdapterError(f"key {key!r} holds NaN or infinite values")
        with self._open_base() as base:
            made: dict[Place, ProjectionWeights] = {}
            for name, keys in self._keys.items():
                weights = self._make(name, {part: tensors[key] for part, key in keys.items()}, base)
                made |= self._split(name, weights)
            outer = {} if base is None or self._outer.is_empty else self._outer.extras(tensors, base)
        for layer, extras in self._experts.extras(tensors).items():
            outer[layer] = extras | outer.get(layer, {})
        return made, outer

    def _make(
        self, name: str, tensors: dict[str, "torch.Tensor"], base: OpenWeights | None
    ) -> ProjectionWeights:
        config = self._config
        a, b = config.kind.product(self._target(name), tensors)
        weights = ProjectionWeights(a, b, self._matches.scale_of(name))
        if config.has_bias:
            return ProjectionWeights(a, b, weights.scale, offset=tensors[BIAS].float() * weights.scale)
        if base is not None and config.start:
            return fold_start(weights, config.start, base, name)
        if base is not None and config.use_dora:
            magnitude, weight, bias = tensors[MAGNITUDE], base.weight(name), base.bias(name)
            return fold_magnitude(weights, magnitude, weight, bias, name)
        return weights

    def _split(self, name: str, weights: ProjectionWeights) -> dict[Place, ProjectionWeights]:
        """Of each projection of a module: all have its A, and their own outputs of the rest."""
        layer, modules = self._sites[name]
        if len(modules) == 1:
            return {(layer, modules[0]): weights}
        ends = list(accumulate(self._shapes.sizes[module][1] for module in modules))
        starts = [0, *ends]
        return {
            (layer, module): weights.rows(slice(start, end))
            for module, start, end in zip(modules, starts, ends, strict=False)
        }

    def _size(self, name: str) -> tuple[int, int]:
        """Inputs and outputs."""
        sizes = [self._shapes.sizes[module] for module in self._sites[name][1]]
        return sizes[0][0], sum(num_out for _, num_out in sizes)

    def _target(self, name: str) -> Target:
        return Target(name, *self._size(name), self._matches.rank_of(name))

    def _check(self, name: str, keys: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> bool:
        """Whether there is a product to serve."""
        kind, target = self._config.kind, self._target(name)
        if not keys:
            if self._matches.is_target(name) and not self._is_pruned:
                raise AdapterError(f"target_modules names {name}, but the file has no weights for it")
            return False
        first = next(iter(keys.values()))
        if not self._matches.is_target(name):
            raise AdapterError(f"key {first!r} is not among the modules that the configuration targets")
        found = {part: stored[key].shape for part, key in {**keys, **self._shared}.items()}
        expected = kind.expect(target, found) | self._optional(target)
        for part, shape in expected.items():
            if part not in found:
                why = f" ({_OPTIONS[part]} is set)" if part in _OPTIONS else ""
                raise AdapterError(f"key {first!r} has no {part.removesuffix('.weight')} beside it{why}")
            _check_stored(stored[keys.get(part, part)], shape)
        if surplus := found.keys() - expected.keys():
            part = min(surplus)
            why = f"{_OPTIONS[part]} is not set" if part in _OPTIONS else f"{kind.title} has others beside it"
            raise AdapterError(f"key {keys[part]!r} is of no use: {why}")
        rank = product_rank(kind, target, found)
        if self._config.start and 2 * rank > MAX_RANK:
            raise AdapterError(
                f"{name}: {self._config.start!r} as saved is of twice its rank, {2 * rank}; at most "
                f"{MAX_RANK} is served"
            )
        return rank > 0

    def _optional(self, target: Target) -> dict[str, tuple[int, ...]]:
        parts = [(BIAS, self._config.has_bias), (MAGNITUDE, self._config.use_dora)]
        return {part: (target.size_out,) for part, is_needed in parts if is_needed}

    @property
    def _is_pruned(self) -> bool:
        return self._config.kind.title == "AdaLoRA"

    # --- the base model's weights ---

    def _check_base(self) -> None:
        config = self._config
        if self._base is None and (config.use_dora or config.start):
            why = "use_dora" if config.use_dora else f"init_lora_weights {config.start!r}"
            raise AdapterError(f"{why} needs the base model's checkpoint, and there is none here")
        if config.start:
            check_start(config.start, [self._size(name) for name in self._keys])

    @contextmanager
    def _open_base(self) -> Iterator[OpenWeights | None]:
        """None where nothing of this adapter is told relative to them."""
        is_needed = self._config.use_dora or self._config.start or not self._outer.is_empty
        if self._base is None or not is_needed:
            yield None
        else:
            with self._base.open() as weights:
                yield weights


def _is_ignored(key: str) -> bool:
    """PEFT takes no note of a tensor that is no parameter of the model with its adapters; here, an adapter's
    is refused all the same: it was trained, and would be missing.
    """
    return _ADAPTER_PART.search(key) is None and _BASE_PARAMETER.fullmatch(key) is None


def _explain_ignored(key: str) -> str:
    return f"key {key[:200]!r} is no parameter of the base model; it is ignored, as PEFT ignores it"


def _by_module(keys: list[str], config: PeftConfig, shapes: BaseShapes) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    names = {name.split(".")[-1]: name for name in shapes.stored_modules}
    for key in keys:
        module, part = _parse_key(key, config, shapes.num_layers, names)
        parts = found.setdefault(module, {})
        if part in parts:
            raise AdapterError(f"keys {parts[part]!r} and {key!r} are the same weight")
        parts[part] = key
    return found


def _parse_key(key: str, config: PeftConfig, num_layers: int, names: Mapping[str, str]) -> tuple[str, str]:
    """The module, one of a layer's `names`, and the part."""
    match = _KEY.fullmatch(key)
    if match is None or match["name"] not in names:
        raise AdapterError(f"key {shorten(key)} {_explain_key(key, names)}")
    layer = int(match["layer"])
    if layer >= num_layers:
        raise AdapterError(f"key {key!r} is for layer {layer}; the base model has {num_layers} layers")
    if match["module"] != (expected := f"model.layers.{layer}.{names[match['name']]}"):
        raise AdapterError(f"key {key!r} matches nothing; expected {expected}")
    part = match["part"] + (match["tail"] or "")
    if part == f"{MAGNITUDE}.weight":
        part = MAGNITUDE
    if part not in config.kind.parts:
        raise AdapterError(f"key {key!r} is no tensor of {config.kind.title}, the adapter's peft_type")
    return expected, part


def _explain_key(key: str, names: Mapping[str, str]) -> str:
    if "modules_to_save" in key or _ADAPTER_PART.search(key) is None:
        return "is a whole weight; served are those of lm_head, embed_tokens and norms"
    if ".experts." in key:
        return "is of no expert, or of no part of one, that the configuration targets"
    return f"matches no projection of the base model ({', '.join(names)})"


def is_finite(tensor: "torch.Tensor") -> bool:
    """No value is NaN or infinite. By numpy, since torch would wake its threads for each small tensor."""
    import torch

    if tensor.dtype is torch.bfloat16:
        exponents = tensor.view(torch.int16).numpy() & 0x7F80
        return not bool((exponents == 0x7F80).any())
    return bool(np.isfinite(tensor.numpy()).all())


def _check_stored(stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise AdapterError(
            f"key {stored.key!r} has shape {list(stored.shape)}; the base model and the configured rank need "
            f"{list(shape)}"
        )
    if stored.dtype not in FLOATS:
        kind = re.sub(r"^I(?=\d)", "int", stored.dtype[:32])
        raise AdapterError(f"key {stored.key!r} is of type {kind}; it must be a float of 8 to 64 bits")
