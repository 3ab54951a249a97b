"""Which modules the patterns of an `adapter_config.json` match, exactly as PEFT decides it.

The rules are those of peft's `check_target_module_exists` and `get_pattern_key`, with Python's own `re`. A
pattern that could backtrack is matched in a sandbox, as it may take for ever.
"""

import re
from collections.abc import Sequence

from toppings.adapters.errors import AdapterError
from toppings.adapters.peft_config import PeftConfig, shorten
from toppings.sandbox import Sandbox, SandboxError
from toppings.sandbox.patterns import match_all

PATTERN_CPU_S = 1.0
MAX_DIRECT_PAIRS = 100_000
MAX_DIRECT_CHARS = 50_000
"""Of all patterns that are matched in place: so many are compiled within some tenths of a second."""
ANY_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."  # of a path's numbers, the first one
_CAN_BACKTRACK = re.compile(r"[*+?{|(]")
_sandbox = Sandbox()  # its process starts with the first pattern that needs it
_Matches = list[dict[str, str]]


class PeftMatches:
    """What `config` says of each of `modules` (such as `model.layers.0.self_attn.q_proj`), and of
    `parameters` that are none's weight (such as `model.layers.0.mlp.experts.down_proj`).

    Raises AdapterError for a pattern that is none, or that takes too long to match.
    """

    def __init__(self, config: PeftConfig, modules: Sequence[str], parameters: Sequence[str] = ()) -> None:
        self._config = config
        self._modules = list(modules)
        self._excluded = self._named("exclude_modules", config.exclude_modules)
        self._targeted = self._find_targeted()
        self._parameters = {name for name in parameters if self._is_named_parameter(name)}
        self._rank_keys = self._first_keys("rank_pattern", list(config.rank_pattern))
        self._alpha_keys = self._first_keys("alpha_pattern", list(config.alpha_pattern))

    def is_target(self, module: str) -> bool:
        """Whether peft would put an adapter on `module`."""
        return module in self._targeted and module not in self._excluded

    def is_target_parameter(self, parameter: str) -> bool:
        """Neither its layer nor `exclude_modules` counts for peft."""
        return parameter in self._parameters

    def rank_of(self, module: str) -> int:
        return self._config.rank_pattern.get(self._rank_keys.get(module, ""), self._config.rank)

    def scale_of(self, module: str) -> float:
        """Of the module's own rank and alpha."""
        alpha = self._config.alpha_pattern.get(self._alpha_keys.get(module, ""), self._config.alpha)
        return self._config.scale(self.rank_of(module), alpha)

    def unused_patterns(self) -> list[str]:
        """Rank and alpha patterns that say nothing of any of the modules, or are always overruled."""
        used = {
            "rank_pattern": set(self._rank_keys.values()),
            "alpha_pattern": set(self._alpha_keys.values()),
        }
        return [
            f"{option} key {shorten(key)} has no effect on any projection of the base model"
            for option, keys in used.items()
            for key in getattr(self._config, option)
            if key not in keys
        ]

    def _is_named_parameter(self, parameter: str) -> bool:
        return not _ends(parameter).isdisjoint(self._config.target_parameters)

    def _find_targeted(self) -> set[str]:
        targets = self._config.target_modules
        if isinstance(targets, str):
            if targets.lower() == "all-linear":
                return set(self._modules)
            return self._named("target_modules", targets)
        exact = set(targets) & set(self._modules)  # peft does not ask for the layer of these
        return exact | (self._named("target_modules", targets) & self._in_chosen_layers())

    def _named(self, option: str, names: str | list[str]) -> set[str]:
        """A text is a pattern for the whole path, a list holds paths or their ends."""
        if isinstance(names, str):
            return set(self._match(option, [names], is_full=True)[0]) if names else set()
        wanted = set(names)
        return {module for module in self._modules if not wanted.isdisjoint(_ends(module))}

    def _in_chosen_layers(self) -> set[str]:
        layers = set(self._config.layers_to_transform)
        if not layers:
            return set(self._modules)
        named = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in self._config.layers_pattern]
        given = self._config.layers_pattern
        found = (
            self._match("layers_pattern", named, given) if named else match_all([ANY_LAYER], self._modules)
        )
        layer_of: dict[str, str] = {}
        for matches in reversed(found):  # the first pattern that matches counts
            layer_of |= matches
        return {module for module, layer in layer_of.items() if int(layer) in layers}

    def _first_keys(self, option: str, keys: list[str]) -> dict[str, str]:
        patterns = [rf"(.*\.)?({key})$" for key in keys]
        found = self._match(option, patterns, keys, names=[*self._modules, *self._parameters])
        first: dict[str, str] = {}
        for key, matches in zip(keys[::-1], found[::-1], strict=True):
            first |= dict.fromkeys(matches, key)
        return first

    def _match(
        self,
        option: str,
        patterns: list[str],
        given: list[str] | None = None,
        *,
        is_full: bool = False,
        names: list[str] | None = None,
    ) -> _Matches:
        """`given`: what of `patterns` the checkpoint says, the rest being PEFT's own and harmless; `names`:
        by default the modules."""
        names = self._modules if names is None else names
        can_backtrack = any(_CAN_BACKTRACK.search(pattern) for pattern in given or patterns)
        is_little = (
            len(patterns) * len(names) <= MAX_DIRECT_PAIRS and sum(map(len, patterns)) <= MAX_DIRECT_CHARS
        )
        try:
            if not can_backtrack and is_little:
                return match_all(patterns, names, is_full=is_full)
            found: _Matches = _sandbox.run(
                "match", cpu_s=PATTERN_CPU_S, patterns=patterns, names=names, is_full=is_full
            )
        except ValueError as error:
            which = f"{option} {shorten((given or patterns)[0])}" if len(patterns) == 1 else option
            reason = (
                f"{error} to match" if isinstance(error, SandboxError) and "longer" in str(error) else error
            )
            raise AdapterError(f"{which}: {reason}") from error
        return found


def _ends(module: str) -> set[str]:
    """The path and all that follows one of its dots."""
    parts = module.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}
