"""`adapter_config.json` of a PEFT adapter: of which kind it is, what it targets, with which rank and scale.

Which modules its patterns match is decided in `peft_matches.py`.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from toppings.adapters.bounded_json import parse_bounded
from toppings.adapters.errors import AdapterError
from toppings.adapters.peft_kinds import ADALORA_EPSILON, KINDS, MAX_RANK, PeftKind
from toppings.bad_input import MAX_INT, RequestError, check_unicode

MAX_ALPHA = 1e30  # no adapter comes near; a larger one would overflow in fp32
MAX_PATTERNS = 8192  # of one option; the largest models have some 900 projections
MAX_PATTERN_CHARS = 4096
MAX_INVOCATION_TOKENS = 256
MAX_TRAINED_TOKENS = 65_536
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
        *("megatron_core", "qalora_group_size", "runtime_config"),
    }
)
_UNDERSTOOD = frozenset(
    {
        *("peft_type", "r", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_dora", "lora_bias"),
        *("lora_alpha", "use_rslora", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"),
        *("fan_in_fan_out", "alora_invocation_tokens", "target_parameters"),
    }
)
_UNSUPPORTED = {
    "arrow_config": "a mixture of adapters (Arrow) is not supported",
    "kasa_config": "KaSA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_qalora": "QALoRA is not supported",
    "megatron_config": "Megatron's layers are not supported",
    "layer_replication": "replicated layers are not supported",
}
"""Options that change the arithmetic. Those that PEFT does not know, it ignores with a warning; so do we."""
T = TypeVar("T")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PISSA, OLORA = "pissa", "olora"
"""What `init_lora_weights` may be that changed the base model's weights in a way that they alone say."""
_KNOWN_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
_BIASES = ("none", "all", "lora_only", "vera_only")


@dataclass(frozen=True)
class PeftConfig:
    """What of the configuration changes the result; `warnings` says what was ignored, as PEFT ignores it.

    `invocation_tokens`: of an activated LoRA, which acts from their last place in the prompt on; else empty.
    `start`: what training began with and took from the base model's weights, `PISSA`, `OLORA` or "".
    """

    kind: PeftKind

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
    target_parameters: tuple[str, ...] = ()
    use_dora: bool = False
    has_bias: bool = False
    start: str = ""
    modules_to_save: tuple[str, ...] = ()
    token_indices: Mapping[str, list[int]] = field(default_factory=dict)  # by module's name
    ties_weights: bool = False
    invocation_tokens: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Served are the A and B that PEFT has saved."""
        return self.kind is KINDS["LORA"] and not self.use_dora and not self.start

    @classmethod
    def read(cls, text: bytes) -> "PeftConfig":
        """Raises AdapterError for malformed values and for every option that would change the result."""
        try:
            fields = parse_bounded(text)
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{CONFIG_FILE} is not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise AdapterError(f"{CONFIG_FILE} must hold an object, not {type(fields).__name__}")
        kind = _kind(fields)
        _refuse_unsupported(fields)
        is_lora, is_adalora = kind is KINDS["LORA"], kind is KINDS["ADALORA"]
        rank_name, alpha_name = kind.rank_option, kind.alpha_option
        config = cls(
            kind=kind,
            base_model=_text("base_model_name_or_path", fields.get("base_model_name_or_path")),
            rank=_rank(rank_name, fields.get(rank_name, kind.default_rank)),
            alpha=_number(alpha_name, fields.get(alpha_name, 8)),
            use_rslora=is_lora and _flag("use_rslora", fields.get("use_rslora", False)),
            rank_pattern={} if is_adalora else _pattern("rank_pattern", fields.get("rank_pattern"), _rank),
            alpha_pattern={}
            if is_adalora
            else _pattern("alpha_pattern", fields.get("alpha_pattern"), _number),
            target_modules=_names("target_modules", fields.get("target_modules")),
            exclude_modules=_names("exclude_modules", fields.get("exclude_modules")),
            layers_to_transform=_layers(fields.get("layers_to_transform")),
            layers_pattern=as_list(_names("layers_pattern", fields.get("layers_pattern"))),
            target_parameters=_parameters(fields.get("target_parameters")),
            use_dora=_flag("use_dora", fields.get("use_dora", False)),
            has_bias=_flag("lora_bias", fields.get("lora_bias", False)),
            start=_start(fields.get("init_lora_weights")),
            modules_to_save=tuple(as_list(_names("modules_to_save", fields.get("modules_to_save")))),
            token_indices=_tokens(fields.get("trainable_token_indices")),
            ties_weights=_flag("ensure_weight_tying", fields.get("ensure_weight_tying", False)),
            invocation_tokens=_invocation(fields.get("alora_invocation_tokens"), fields.get("task_type")),
            warnings=tuple(_ignored(fields, kind)),
        )
        config._check_consistency()
        if config.has_bias and (init := fields.get("init_lora_weights", True)) not in (True, False):
            raise AdapterError(
                "lora_bias goes with init_lora_weights true or false alone, in PEFT, too, not with "
                f"{shorten(init)}"
            )
        return config

    def scale(self, rank: int, alpha: float) -> float:
        """What a product of configured `rank` is multiplied by, for a projection's own `alpha`."""
        if not self.kind.alpha_option:
            return 1.0
        if self.kind is KINDS["ADALORA"]:
            return (alpha if alpha > 0 else float(rank)) / (self.rank + ADALORA_EPSILON)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _check_consistency(self) -> None:
        chosen = [
            name for name, is_on in (("use_dora", self.use_dora), ("lora_bias", self.has_bias)) if is_on
        ]
        if self.start:
            chosen.append(f"init_lora_weights {self.start!r}")
        if self.kind is not KINDS["LORA"] and self.target_parameters:
            chosen.append("target_parameters")
        if self.kind is not KINDS["LORA"] and chosen:
            raise AdapterError(f"{chosen[0]} goes with LoRA alone, not with {self.kind.title}")
        if self.use_dora and self.has_bias:
            raise AdapterError(
                "lora_bias is not supported for DoRA, nor by PEFT: set use_dora or lora_bias to false"
            )
        if self.use_dora and self.invocation_tokens:
            raise AdapterError("alora_invocation_tokens is not supported for DoRA, nor by PEFT")
        if len(chosen) > 1:
            raise AdapterError(f"{' and '.join(chosen)} together are not supported")
        if not self.target_modules and not self.target_parameters:
            raise AdapterError("target_modules is missing or empty; it must name the projections")
        if isinstance(self.target_modules, str) and (self.layers_to_transform or self.layers_pattern):
            raise AdapterError("layers_to_transform and layers_pattern need target_modules to be a list")
        if self.layers_pattern and not self.layers_to_transform:
            raise AdapterError("layers_pattern needs layers_to_transform, which is missing or empty")


def _kind(fields: dict[str, Any]) -> PeftKind:
    peft_type = fields.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in KINDS:
        raise AdapterError(f"peft_type is {shorten(peft_type)}; it must be one of {', '.join(KINDS)}")
    return KINDS[peft_type]


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    if (bias := fields.get("bias", "none")) not in _BIASES:
        raise AdapterError(f"bias is {shorten(bias)}; it must be one of {', '.join(_BIASES)}")
    for name, reason in _UNSUPPORTED.items():
        if fields.get(name):
            raise AdapterError(f"{name} is {shorten(fields[name])}: {reason}")


def _start(init: Any) -> str:
    """What of the base model's weights training began with. Raises AdapterError for what they do not say."""
    if not isinstance(init, str):
        return ""
    if init == PISSA or init.lower() == OLORA:
        return init.lower()
    if init.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"init_lora_weights is {shorten(init)}, which also changes the base model's weights; save the "
            "adapter with path_initial_model_for_weight_conversion to make it a plain LoRA"
        )
    if init.lower() not in _KNOWN_INITS:
        raise AdapterError(
            f"init_lora_weights is {shorten(init)}; it must be true, false or one of "
            f"{', '.join((*_KNOWN_INITS[:4], PISSA, OLORA))}"
        )
    return ""


def _ignored(fields: dict[str, Any], kind: PeftKind) -> list[str]:
    known = _MEANINGLESS | _UNDERSTOOD | _UNSUPPORTED.keys() | kind.options
    warnings = [
        f"{shorten(name)} is {shorten(value)}: an option that is not known; it is ignored, as PEFT ignores it"
        for name, value in fields.items()
        if value and name not in known
    ]
    if kind is KINDS["ADALORA"]:
        warnings += [
            f"{name} has no effect with AdaLoRA"
            for name in ("alpha_pattern", "use_rslora")
            if fields.get(name)
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


def _parameters(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        raise AdapterError(f"target_parameters is {shorten(value)}; it must be a list of names")
    return tuple(as_list(_names("target_parameters", value)))


def _layers(value: Any) -> list[int]:
    layers = [] if value is None else [value] if isinstance(value, int) else value
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise AdapterError(f"layers_to_transform is {shorten(value)}; it must be a layer or a list of layers")
    return layers


def _tokens(value: Any) -> dict[str, list[int]]:
    """By module's name; a list is of the embedding."""
    given = value if isinstance(value, dict) else {} if value is None else {"embed_tokens": value}
    for ids in given.values():
        is_list = isinstance(ids, list) and 1 <= len(ids) <= MAX_TRAINED_TOKENS
        if not is_list or not all(type(token) is int and 0 <= token <= MAX_INT for token in ids):
            raise AdapterError(
                f"trainable_token_indices is {shorten(value)}; it must be a list of 1 to {MAX_TRAINED_TOKENS}"
                " token ids, or such lists by module"
            )
    return given


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
