"""`adapter_config.json` of a PEFT LoRA: what it targets, with which rank and scale.

The matching rules are those of peft's `check_target_module_exists` and `get_pattern_key`.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from toppings.adapters.errors import AdapterError
from toppings.core import MODULES

MAX_RANK = 512
MAX_ALPHA = 1e30  # no adapter comes near; a larger one would overflow in fp32
CONFIG_FILE = "adapter_config.json"

_MEANINGLESS = frozenset(
    {  # describe training or bookkeeping: the trained weights mean the same whatever they say
        *(
            "auto_mapping",
            "base_model_name_or_path",
            "inference_mode",
            "peft_version",
            "revision",
            "task_type",
        ),
        *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
        *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    }
)
_UNDERSTOOD = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"),
    }
)
_UNSUPPORTED = {
    "use_dora": "DoRA is not supported",
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not supported",
    "modules_to_save": "whole modules beside the LoRA are not supported",
    "fan_in_fan_out": "weights of Conv1D layers are not supported",
    "lora_bias": "a bias beside B is not supported",
    "layer_replication": "replicated layers are not supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "target_parameters": "LoRA on bare parameters is not supported",
}
T = TypeVar("T")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """What of the configuration changes the result."""

    base_model: str
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | list[str]
    exclude_modules: str | list[str]
    layers_to_transform: list[int]
    layers_pattern: list[str]

    @classmethod
    def read(cls, text: bytes) -> "PeftConfig":
        """Raises AdapterError for malformed values and for every option that would change the result."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{CONFIG_FILE} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise AdapterError(f"{CONFIG_FILE} must hold an object, not {type(fields).__name__}")
        _refuse_unsupported(fields)
        config = cls(
            base_model=str(fields.get("base_model_name_or_path") or ""),
            rank=_rank("r", fields.get("r", 8)),
            alpha=_number("lora_alpha", fields.get("lora_alpha", 8)),
            use_rslora=_flag("use_rslora", fields.get("use_rslora", False)),
            rank_pattern=_pattern("rank_pattern", fields.get("rank_pattern"), _rank),
            alpha_pattern=_pattern("alpha_pattern", fields.get("alpha_pattern"), _number),
            target_modules=_names("target_modules", fields.get("target_modules")),
            exclude_modules=_names("exclude_modules", fields.get("exclude_modules")),
            layers_to_transform=_layers(fields.get("layers_to_transform")),
            layers_pattern=_as_list(_names("layers_pattern", fields.get("layers_pattern"))),
        )
        config._check_consistency()
        return config

    def _check_consistency(self) -> None:
        if not self.target_modules:
            raise AdapterError("target_modules is missing or empty; it must name the projections")
        if isinstance(self.target_modules, str) and (self.layers_to_transform or self.layers_pattern):
            raise AdapterError("layers_to_transform and layers_pattern need target_modules to be a list")
        for name in _as_list(self.target_modules):
            if name.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens"):
                raise AdapterError(f"target_modules holds {name!r}; supported: {', '.join(MODULES)}")
        for pattern in (*self.rank_pattern, *self.alpha_pattern, *self.layers_pattern):
            _compile(pattern)

    def is_target(self, module: str) -> bool:
        """Whether peft would put an adapter on `module`, e.g. `model.layers.0.self_attn.q_proj`."""
        if _matches_names(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return True
        return _matches_names(self.target_modules, module) and self._is_layer_chosen(module)

    def _is_layer_chosen(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        match = next((m for p in patterns if (m := re.match(p, module))), None)
        return match is not None and int(match[1]) in self.layers_to_transform

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_first_match(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r, or with rsLoRA alpha / sqrt(r), of the module's own rank and alpha."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(_first_match(self.alpha_pattern, module), self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def check_patterns(self, modules: Iterable[str]) -> None:
        """Raises AdapterError for a rank or alpha pattern that matches none of the base model's `modules`."""
        modules = list(modules)
        for option, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns:
                if not any(_matches_pattern(pattern, module) for module in modules):
                    raise AdapterError(f"{option} key {pattern!r} matches no projection of the base model")


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    if (peft_type := fields.get("peft_type")) != "LORA":
        raise AdapterError(f"peft_type is {peft_type!r}; only 'LORA' is supported")
    if (bias := fields.get("bias", "none")) != "none":
        raise AdapterError(f"bias is {bias!r}; only 'none' is supported")
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"init_lora_weights is {init!r}, which also changes the base model's weights; save the adapter "
            "with path_initial_model_for_weight_conversion to make it a plain LoRA"
        )
    for name, value in fields.items():
        # An option we have never heard of may only be off: what it would do is unknown.
        if value and name not in _MEANINGLESS and name not in _UNDERSTOOD:
            reason = _UNSUPPORTED.get(name, "this option is not supported")
            raise AdapterError(f"{name} is {_shorten(value)}: {reason}")
    for name in ("alora_invocation_tokens", "trainable_token_indices"):
        if fields.get(name) is not None:
            raise AdapterError(f"{name} is {_shorten(fields[name])}: {_UNSUPPORTED[name]}")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise AdapterError(f"{name} is {_shorten(value)}; a rank must be an integer from 1 to {MAX_RANK}")
    return value


def _number(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MAX_ALPHA:  # false for NaN, too
        raise AdapterError(f"{name} is {_shorten(value)}; it must be a number of at most {MAX_ALPHA:g}")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | None):
        raise AdapterError(f"{name} is {_shorten(value)}; it must be true or false")
    return bool(value)


def _pattern(name: str, value: Any, check: Callable[[str, Any], T]) -> dict[str, T]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterError(f"{name} is {_shorten(value)}; it must map module names or patterns to numbers")
    return {key: check(f"{name}[{key!r}]", number) for key, number in value.items()}


def _names(name: str, value: Any) -> str | list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        _compile(value)
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise AdapterError(f"{name} is {_shorten(value)}; it must be a pattern or a list of names")


def _layers(value: Any) -> list[int]:
    layers = [] if value is None else [value] if isinstance(value, int) else value
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise AdapterError(
            f"layers_to_transform is {_shorten(value)}; it must be a layer or a list of layers"
        )
    return layers


def _as_list(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _compile(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{pattern!r} is not a valid pattern: {error}") from error


def _matches_names(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _matches_pattern(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _first_match(patterns: Iterable[str], module: str) -> str:
    return next((pattern for pattern in patterns if _matches_pattern(pattern, module)), module)
