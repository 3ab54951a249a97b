"""`adapter_config.json` of a PEFT LoRA: what it targets, with which rank and scale.

Which modules its patterns match is decided in `peft_matches.py`.
"""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from toppings.adapters.bounded_json import parse_bounded
from toppings.adapters.errors import AdapterError
from toppings.bad_input import MAX_INT, RequestError, check_unicode
from toppings.core import MODULES

MAX_RANK = 512
MAX_ALPHA = 1e30  # no adapter comes near; a larger one would overflow in fp32
MAX_PATTERNS = 8192  # of one option; the largest models have some 900 projections
MAX_PATTERN_CHARS = 4096
MAX_INVOCATION_TOKENS = 256
MAX_ALL_CHARS = 2**19  # of all patterns of one option: more take longer to compile than matching them may
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
        *("fan_in_fan_out", "alora_invocation_tokens"),
    }
)
_UNSUPPORTED = {
    "use_dora": "DoRA is not supported",
    "arrow_config": "a mixture of adapters (Arrow) is not supported",
    "kasa_config": "KaSA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_qalora": "QALoRA is not supported",
    "megatron_config": "Megatron's layers are not supported",
    "modules_to_save": "whole modules beside the LoRA are not supported",
    "lora_bias": "a bias beside B is not supported",
    "layer_replication": "replicated layers are not supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "target_parameters": "LoRA on bare parameters is not supported",
}
"""Options that change the arithmetic. Those that PEFT does not know, it ignores with a warning; so do we."""
T = TypeVar("T")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KNOWN_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class PeftConfig:
    """What of the configuration changes the result; `warnings` says what was ignored, as PEFT ignores it.

    `invocation_tokens`: of an activated LoRA, which acts from their last place in the prompt on; else empty.
    """

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
    invocation_tokens: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: bytes) -> "PeftConfig":
        """Raises AdapterError for malformed values and for every option that would change the result."""
        try:
            fields = parse_bounded(text)
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{CONFIG_FILE} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise AdapterError(f"{CONFIG_FILE} must hold an object, not {type(fields).__name__}")
        _refuse_unsupported(fields)
        _check_init(fields.get("init_lora_weights"))
        config = cls(
            base_model=_text("base_model_name_or_path", fields.get("base_model_name_or_path")),
            rank=_rank("r", fields.get("r", 8)),
            alpha=_number("lora_alpha", fields.get("lora_alpha", 8)),
            use_rslora=_flag("use_rslora", fields.get("use_rslora", False)),
            rank_pattern=_pattern("rank_pattern", fields.get("rank_pattern"), _rank),
            alpha_pattern=_pattern("alpha_pattern", fields.get("alpha_pattern"), _number),
            target_modules=_names("target_modules", fields.get("target_modules")),
            exclude_modules=_names("exclude_modules", fields.get("exclude_modules")),
            layers_to_transform=_layers(fields.get("layers_to_transform")),
            layers_pattern=as_list(_names("layers_pattern", fields.get("layers_pattern"))),
            invocation_tokens=_invocation(fields.get("alora_invocation_tokens"), fields.get("task_type")),
            warnings=tuple(_ignored(fields)),
        )
        config._check_consistency()
        return config

    def _check_consistency(self) -> None:
        if not self.target_modules:
            raise AdapterError("target_modules is missing or empty; it must name the projections")
        if isinstance(self.target_modules, str) and (self.layers_to_transform or self.layers_pattern):
            raise AdapterError("layers_to_transform and layers_pattern need target_modules to be a list")
        for name in as_list(self.target_modules):
            if name.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens"):
                raise AdapterError(f"target_modules holds {name!r}; supported: {', '.join(MODULES)}")
        if self.layers_pattern and not self.layers_to_transform:
            raise AdapterError("layers_pattern needs layers_to_transform, which is missing or empty")


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    if (peft_type := fields.get("peft_type")) != "LORA":
        raise AdapterError(f"peft_type is {peft_type!r}; only 'LORA' is supported")
    if (bias := fields.get("bias", "none")) not in _BIASES:
        raise AdapterError(f"bias is {shorten(bias)}; it must be one of {', '.join(_BIASES)}")
    for name, reason in _UNSUPPORTED.items():
        if fields.get(name):
            raise AdapterError(f"{name} is {shorten(fields[name])}: {reason}")
    if fields.get("trainable_token_indices") is not None:
        value, reason = fields["trainable_token_indices"], _UNSUPPORTED["trainable_token_indices"]
        raise AdapterError(f"trainable_token_indices is {shorten(value)}: {reason}")


def _check_init(init: Any) -> None:
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"init_lora_weights is {shorten(init)}, which also changes the base model's weights; save the "
            "adapter with path_initial_model_for_weight_conversion to make it a plain LoRA"
        )
    if isinstance(init, str) and init.lower() not in _KNOWN_INITS:
        raise AdapterError(
            f"init_lora_weights is {shorten(init)}; it must be true, false or one of "
            f"{', '.join(_KNOWN_INITS[:4])}"
        )


def _ignored(fields: dict[str, Any]) -> list[str]:
    known = _MEANINGLESS | _UNDERSTOOD | _UNSUPPORTED.keys()
    warnings = [
        f"{shorten(name)} is {shorten(value)}: an option that is not known; it is ignored, as PEFT ignores it"
        for name, value in fields.items()
        if value and name not in known
    ]
    if fields.get("fan_in_fan_out"):
        warnings.append("fan_in_fan_out is set, but all projections are Linear; it is ignored, as PEFT does")
    return warnings[:20]


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 80
_BRIEF.maxlevel = 3


def shorten(value: Any) -> str:
    """`repr`, cut in length and depth: the value is a stranger's."""
    return _BRIEF.repr(value)


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise AdapterError(f"{name} is {shorten(value)}; a rank must be an integer from 1 to {MAX_RANK}")
    return value


def _number(name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MAX_ALPHA:  # false for NaN, too
        raise AdapterError(f"{name} is {shorten(value)}; it must be a number of at most {MAX_ALPHA:g}")
    return float(value)


def _text(name: str, value: Any) -> str:
    text = str(value or "")
    if len(text) > MAX_PATTERN_CHARS:
        raise AdapterError(f"{name} has {len(text)} characters; at most {MAX_PATTERN_CHARS} are read")
    try:
        check_unicode(name, text)
    except RequestError as error:
        raise AdapterError(str(error)) from error
    return text


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | None):
        raise AdapterError(f"{name} is {shorten(value)}; it must be true or false")
    return bool(value)


def _pattern(name: str, value: Any, check: Callable[[str, Any], T]) -> dict[str, T]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterError(f"{name} is {shorten(value)}; it must map module names or patterns to numbers")
    _check_patterns(name, list(value))
    return {key: check(f"{name}[{shorten(key)}]", number) for key, number in value.items()}


def _check_patterns(name: str, patterns: list[str]) -> None:
    if len(patterns) > MAX_PATTERNS:
        raise AdapterError(f"{name} has {len(patterns)} entries; at most {MAX_PATTERNS} are read")
    if (num_chars := sum(map(len, patterns))) > MAX_ALL_CHARS:
        raise AdapterError(f"{name} has {num_chars} characters of patterns; at most {MAX_ALL_CHARS} are read")
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise AdapterError(
                f"{name} has an entry of {len(pattern)} characters, {shorten(pattern)}; at most "
                f"{MAX_PATTERN_CHARS} are read"
            )


def _names(name: str, value: Any) -> str | list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        _check_patterns(name, [value])
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        _check_patterns(name, value)
        return value
    raise AdapterError(f"{name} is {shorten(value)}; it must be a pattern or a list of names")


def _layers(value: Any) -> list[int]:
    layers = [] if value is None else [value] if isinstance(value, int) else value
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise AdapterError(f"layers_to_transform is {shorten(value)}; it must be a layer or a list of layers")
    return layers


def _invocation(value: Any, task_type: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    is_list = isinstance(value, list) and 1 <= len(value) <= MAX_INVOCATION_TOKENS
    if not is_list or not all(type(token) is int and 0 <= token <= MAX_INT for token in value):
        raise AdapterError(
            f"alora_invocation_tokens is {shorten(value)}; it must be a list of 1 to {MAX_INVOCATION_TOKENS}"
            " token ids"
        )
    if task_type != "CAUSAL_LM":
        raise AdapterError(
            f"task_type is {shorten(task_type)}, with which PEFT never activates an adapter with"
            " alora_invocation_tokens; it must be 'CAUSAL_LM'"
        )
    return tuple(value)


def as_list(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names
