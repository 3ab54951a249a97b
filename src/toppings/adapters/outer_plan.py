"""What an adapter has outside its layers' projections: LoRA on embedding and output layer, and tensors that
stand in the place of the base model's (`modules_to_save`, `trainable_token_indices`).

What PEFT loads counts: a whole weight of a module that is not named by `modules_to_save` replaces the base
model's own, and so that of an output layer which is tied to it. Weights of both ends may have rows for more
tokens than the base model's. Of a weight that differs from the base model's in a minority of its rows, only
these are kept.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from toppings.adapters.base_weights import BaseWeights, OpenWeights
from toppings.adapters.errors import AdapterError
from toppings.adapters.folding import ProjectionWeights, fold_magnitude
from toppings.adapters.layout import EMBED, HEAD, NORM, TIED, VOCABULARY
from toppings.adapters.peft_config import PeftConfig, shorten
from toppings.adapters.peft_kinds import KINDS
from toppings.adapters.peft_matches import PeftMatches
from toppings.adapters.stored_tensors import FLOATS, StoredTensor

if TYPE_CHECKING:
    import torch

OUTSIDE_LAYERS = {"lm_head": HEAD, "model.embed_tokens": EMBED}
"""The base model's modules, and what extras call them."""
_WHOLE = re.compile(
    r"base_model\.model\.(?P<module>lm_head|model\.(?:embed_tokens|norm|layers\.(?P<layer>\d{1,6})\."
    r"(?:input_layernorm|post_attention_layernorm|(?:pre|post)_feedforward_layernorm|self_attn\.[qk]_norm)))"
    r"(?P<base>\.(?:token_adapter\.)?base_layer)?\.weight",
    re.ASCII,
)
_LOW_RANK = re.compile(
    r"base_model\.model\.(?P<module>lm_head|model\.embed_tokens)\."
    r"(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?:\.default)?(?P<tail>\.weight|\.bias)?",
    re.ASCII,
)
_TOKENS = re.compile(
    r"base_model\.model\.(?P<module>lm_head|model\.embed_tokens)\.token_adapter\.trainable_tokens_delta"
    r"(?:\.default)?",
    re.ASCII,
)
_PARTS = {
    "model.embed_tokens": ("lora_embedding_A", "lora_embedding_B"),
    "lm_head": ("lora_A.weight", "lora_B.weight"),
}
_MAGNITUDE, _BIAS = "lora_magnitude_vector", "lora_B.bias"
_TOKENS_BASE = ".token_adapter.base_layer.weight"
MAX_ADDED_TOKENS = 2**16

Extras = dict[int, dict[str, "torch.Tensor"]]


class OuterPlan:
    """`taken`: keys that it knows; `keys`: those of them that are to be read; `warnings`: what has no effect;
    `vocab_size`: the adapter's tokens, 0 where they are no more than the base model's.

    Raises AdapterError for what would not give what PEFT gives.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        config: PeftConfig,
        num_layers: int,
        matches: PeftMatches,
        base: BaseWeights | None,
    ) -> None:
        self._config, self._matches, self._num_layers = config, matches, num_layers
        self._stored = stored
        self.vocab_size = 0
        self.warnings: list[str] = []
        self._targeted = {name for name in OUTSIDE_LAYERS if _is_target(name, config, matches)}
        self._whole: dict[str, str] = {}  # keys by module
        self._low_rank: dict[str, dict[str, str]] = {}  # by module and part
        self._tokens: dict[str, str] = {}
        for key in stored:
            self._sort(key)
        self.taken = {*self._whole.values(), *self._tokens.values()}
        self.taken |= {key for keys in self._low_rank.values() for key in keys.values()}
        self.keys = set(self.taken)
        if not (self.taken or self._targeted or config.modules_to_save or config.token_indices):
            return
        if base is None:
            raise AdapterError(f"{self._reason()} needs the base model's checkpoint, and there is none here")
        with base.open() as weights:
            self._ids = self._token_ids(weights)
            if weights.is_tied:
                self._join_ends()
            self._num_tokens = self._count_tokens(weights)
            self._check(weights)
            if self._num_tokens > weights.shape("model.embed_tokens")[0]:
                self.vocab_size = self._num_tokens

    def _reason(self) -> str:
        """What asks for something outside the projections."""
        options = {
            "modules_to_save": self._config.modules_to_save,
            "trainable_token_indices": self._config.token_indices,
            f"target_modules {shorten(self._config.target_modules)}": self._targeted,
        }
        return next(
            (name for name, value in options.items() if value), f"key {min(self.taken, default='')!r}"
        )

    @property
    def is_empty(self) -> bool:
        return not self.taken

    def extras(self, tensors: Mapping[str, "torch.Tensor"], base: OpenWeights) -> Extras:
        """By layer and name (`layout.py`)."""
        found: Extras = {}
        for module, key in self._whole.items():
            if module not in OUTSIDE_LAYERS:
                self._put(found, module, _norm_name(module), tensors[key])
        for module, name in OUTSIDE_LAYERS.items():
            for part, tensor in self._own_rows(module, tensors, base).items():
                self._put(found, module, f"{name}.{part}", tensor)
        if self.vocab_size:
            import torch

            self._put(found, "model.embed_tokens", VOCABULARY, torch.empty(self.vocab_size, 0))
        for module in self._low_rank:
            for name, tensor in self._product(module, tensors, base).items():
                self._put(found, module, f"{OUTSIDE_LAYERS[module]}.{name}", tensor)
        if base.is_tied and self._shares_embedding:
            import torch

            self._put(found, "lm_head", TIED, torch.empty(0))
        return found

    # --- what there is ---

    def _sort(self, key: str) -> None:
        if (match := _TOKENS.fullmatch(key)) is not None:
            self._tokens[match["module"]] = key
        elif (match := _LOW_RANK.fullmatch(key)) is not None:
            part = (match["part"] + (match["tail"] or "")).replace(f"{_MAGNITUDE}.weight", _MAGNITUDE)
            parts = self._low_rank.setdefault(match["module"], {})
            if part in parts:
                raise AdapterError(f"keys {parts[part]!r} and {key!r} are the same weight")
            parts[part] = key
        elif (match := _WHOLE.fullmatch(key)) is not None:
            module = match["module"]
            is_beside_tokens = key.endswith(_TOKENS_BASE)
            if is_beside_tokens or bool(match["base"]) == (module in self._targeted):
                self._whole[module] = key
            elif module in self._targeted:
                raise AdapterError(f"key {key!r} is a whole weight beside a LoRA of the same module")

    def _token_ids(self, base: OpenWeights) -> dict[str, list[int]]:
        """By module; PEFT trains both ends of a tied model as one."""
        given, ids = self._config.token_indices, {}
        for name, indices in given.items():
            module = next((m for m in OUTSIDE_LAYERS if m.endswith(name)), None)
            if module is None:
                raise AdapterError(
                    f"trainable_token_indices names {shorten(name)}; it must be embed_tokens or lm_head"
                )
            ids[module] = indices
        if base.is_tied and ids.get("lm_head") == ids.get("model.embed_tokens"):
            ids.pop("lm_head", None)
        return ids

    def _join_ends(self) -> None:
        """Of a tied model: what PEFT has saved of one end, or of both, is the weight of both."""
        ends = "model.embed_tokens", "lm_head"
        if "lm_head" not in self._ids and all(each in self._tokens for each in ends):
            del self._tokens["lm_head"]
            self._whole.pop("lm_head", None)
        if (
            "lm_head" in self._whole
            and "model.embed_tokens" not in self._whole
            and not self._saves("lm_head")
        ):
            self._whole["model.embed_tokens"] = self._whole.pop("lm_head")

    def _saves(self, module: str) -> bool:
        return any(each and module.endswith(each) for each in self._config.modules_to_save)

    @property
    def _shares_embedding(self) -> bool:
        """What replaces the embedding, or rows of it, replaces a tied output layer's, too."""
        is_own = "lm_head" in self._whole or "lm_head" in self._tokens
        is_free = not self._saves("model.embed_tokens") or self._config.ties_weights
        is_whole = "model.embed_tokens" in self._whole and is_free
        return not is_own and (is_whole or "model.embed_tokens" in self._tokens)

    def _count_tokens(self, base: OpenWeights) -> int:
        """The most that any weight has rows for, or the base model's tokens."""
        num_tokens = [base.shape(module)[0] for module in OUTSIDE_LAYERS]
        num_tokens += [1 + max(ids) for ids in self._ids.values()]
        keys = [self._whole[module] for module in OUTSIDE_LAYERS if module in self._whole]
        num_tokens += [size for key in keys for size in self._stored[key].shape[:1]]
        for module, axis in (("model.embed_tokens", 1), ("lm_head", 0)):
            part = _PARTS[module][axis ^ 1]  # the one with a value per token
            if (key := self._low_rank.get(module, {}).get(part)) is not None:
                num_tokens += self._stored[key].shape[axis : axis + 1]
        return max(num_tokens)

    # --- checks ---

    def _check(self, base: OpenWeights) -> None:
        config = self._config
        if self._targeted and config.kind is not KINDS["LORA"]:
            raise AdapterError(f"{config.kind.title} of {min(self._targeted)} is not supported")
        if self._targeted and config.start:
            raise AdapterError(
                f"init_lora_weights {config.start!r} of {min(self._targeted)} is not supported"
            )
        if self._targeted and config.ties_weights and base.is_tied:
            raise AdapterError(f"ensure_weight_tying with {min(self._targeted)} targeted is not supported")
        for module in sorted(self._targeted | self._low_rank.keys()):
            self._check_low_rank(module, base)
        for module, key in self._whole.items():
            self._check_shape(key, self._whole_shape(module, base))
        for module in sorted(self._ids.keys() | self._tokens.keys()):
            self._check_tokens(module, base)
        self._check_saved(base)
        self._check_added(base)

    def _check_added(self, base: OpenWeights) -> None:
        """Both ends must have rows for all tokens that the base model has not."""
        num_base = base.shape("model.embed_tokens")[0]
        if (num_added := self._num_tokens - num_base) <= 0:
            return
        if num_added > MAX_ADDED_TOKENS:
            raise AdapterError(
                f"it has {num_added} tokens more than the base model; at most {MAX_ADDED_TOKENS} are served"
            )
        if self._config.invocation_tokens:
            raise AdapterError(
                "alora_invocation_tokens and tokens that the base model has not are not served together: "
                "what comes before the invocation is the base model's"
            )
        for module in OUTSIDE_LAYERS:
            if not self._has_added(module, num_base, is_tied=base.is_tied):
                raise AdapterError(
                    f"it has {self._num_tokens} tokens, {num_added} more than the base model, and no weights "
                    f"of {module} for all of these; save it with save_embedding_layers=True"
                )

    def _has_added(self, module: str, num_base: int, *, is_tied: bool) -> bool:
        added = range(num_base, self._num_tokens)
        if module in self._whole or set(added) <= set(self._ids.get(module, ())):
            return True
        shares = is_tied and module == "lm_head" and self._shares_embedding
        return shares and self._has_added("model.embed_tokens", num_base, is_tied=is_tied)

    def _check_low_rank(self, module: str, base: OpenWeights) -> None:
        parts = self._low_rank.get(module, {})
        if not parts:
            raise AdapterError(f"target_modules matches {module}, but the file has no weights for it")
        if module not in self._targeted:
            raise AdapterError(
                f"key {next(iter(parts.values()))!r} is not among the modules that the configuration targets"
            )
        for part, shape in self._low_rank_shapes(module, base).items():
            if part not in parts:
                raise AdapterError(f"key {next(iter(parts.values()))!r} has no {part} beside it")
            self._check_shape(parts[part], shape)
        if surplus := parts.keys() - self._low_rank_shapes(module, base).keys():
            raise AdapterError(f"key {parts[min(surplus)]!r} is of no use with this configuration")

    def _low_rank_shapes(self, module: str, base: OpenWeights) -> dict[str, tuple[int, ...]]:
        vocab, hidden = self._num_tokens, base.shape(module)[1]
        rank, is_embed = self._matches.rank_of(module), module == "model.embed_tokens"
        size_in, size_out = (vocab, hidden) if is_embed else (hidden, vocab)
        a, b = _PARTS[module]
        shapes: dict[str, tuple[int, ...]] = {a: (rank, size_in), b: (size_out, rank)}
        if self._config.use_dora:
            shapes[_MAGNITUDE] = (size_out,)
        if self._config.has_bias:
            if is_embed:
                raise AdapterError("lora_bias is set and target_modules matches embed_tokens, which has none")
            shapes[_BIAS] = (size_out,)
        return shapes

    def _whole_shape(self, module: str, base: OpenWeights) -> tuple[int, ...]:
        shape, key = base.shape(module), self._whole[module]
        if module not in OUTSIDE_LAYERS:
            return shape
        if (stored := self._stored[key].shape[:1]) < shape[:1]:
            raise AdapterError(
                f"key {key!r} has {stored[0] if stored else 0} rows; the base model has {shape[0]} tokens, "
                "and an adapter with fewer is not served"
            )
        return (self._num_tokens, *shape[1:])

    def _check_tokens(self, module: str, base: OpenWeights) -> None:
        ids, key = self._ids.get(module), self._tokens.get(module)
        if ids is None:
            raise AdapterError(f"key {key!r} has trained tokens that trainable_token_indices does not name")
        if key is None:
            raise AdapterError(f"trainable_token_indices names {module}, but the file has no weights for it")
        is_alone = module not in self._whole or self._whole[module].endswith(_TOKENS_BASE)
        if not is_alone or module in self._targeted:
            raise AdapterError(
                f"trainable_token_indices and other weights of {module} are not served together"
            )
        if len(set(ids)) < len(ids):
            raise AdapterError("trainable_token_indices holds a token twice; they must be different ids")
        self._check_shape(key, (len(ids), base.shape(module)[1]))

    def _check_saved(self, base: OpenWeights) -> None:
        """`modules_to_save` names modules by how their paths end."""
        for name in self._config.modules_to_save:
            modules = [module for module in base.modules() if name and module.endswith(name)]
            if not modules:
                self.warnings.append(f"modules_to_save names {shorten(name)}, which is not in the base model")
            for module in modules:
                if _WHOLE.fullmatch(f"base_model.model.{module}.weight") is None:
                    raise AdapterError(
                        f"modules_to_save names {shorten(name)}, and {module} cannot be replaced: served are "
                        "lm_head, embed_tokens and norms"
                    )
                if module not in self._whole and not (module == "lm_head" and base.is_tied):
                    raise AdapterError(f"modules_to_save names {module}, but the file has no weight for it")

    def _check_shape(self, key: str, shape: tuple[int, ...]) -> None:
        stored = self._stored[key]
        if stored.shape != shape or stored.dtype not in FLOATS:
            raise AdapterError(
                f"key {key!r} has shape {list(stored.shape)} and type {stored.dtype[:32]}; the base model"
                f" and the configured rank need {list(shape)} and a float of 8 to 64 bits"
            )

    # --- what is served ---

    def _product(
        self, module: str, tensors: Mapping[str, "torch.Tensor"], base: OpenWeights
    ) -> dict[str, "torch.Tensor"]:
        keys, is_embed = self._low_rank[module], module == "model.embed_tokens"
        a, b = (tensors[keys[part]].float() for part in _PARTS[module])
        weights = ProjectionWeights(a, b, self._matches.scale_of(module))
        if self._config.use_dora:
            own = tensors.get(self._whole.get(module, ""))
            weight = base.weight(module) if own is None else own.float()
            magnitude = tensors[keys[_MAGNITUDE]]
            weights = fold_magnitude(weights, magnitude, weight.T if is_embed else weight, None, module)
        offset = tensors[keys[_BIAS]].float() * weights.scale if self._config.has_bias else None
        found = {
            "A": a.T.contiguous() if is_embed else a,
            "B": (weights.b.float() * weights.scale).T.contiguous(),
        }
        found |= {} if weights.gain is None else {"gain": weights.gain}
        return found | ({} if offset is None else {"offset": offset})

    def _own_rows(
        self, module: str, tensors: Mapping[str, "torch.Tensor"], base: OpenWeights
    ) -> dict[str, "torch.Tensor"]:
        from toppings.adapters.outer_rows import own_rows  # needs torch

        whole, trained = self._whole.get(module), self._tokens.get(module)
        return own_rows(
            None if whole is None else tensors[whole],
            None if trained is None else (self._ids[module], tensors[trained]),
            lambda: base.weight(module),
            is_copy=whole is not None and whole.endswith(".base_layer.weight"),
        )

    def _put(self, found: Extras, module: str, name: str, tensor: "torch.Tensor") -> None:
        found.setdefault(self._layer_of(module), {})[name] = tensor

    def _layer_of(self, module: str) -> int:
        """Whose block it travels with: the embedding with the first layer, the end with the last one."""
        if module == "model.embed_tokens":
            return 0
        match = _WHOLE.fullmatch(f"base_model.model.{module}.weight")
        return int(match["layer"]) if match is not None and match["layer"] else self._num_layers - 1


def _norm_name(module: str) -> str:
    return NORM if module == "model.norm" else module.rsplit(".", 1)[-1]


def _is_target(name: str, config: PeftConfig, matches: PeftMatches) -> bool:
    """`all-linear` means neither the embedding nor the output layer."""
    is_shorthand = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    return not is_shorthand and matches.is_target(name)
