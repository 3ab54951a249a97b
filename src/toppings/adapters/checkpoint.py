"""Reads a PEFT LoRA checkpoint whole, or refuses it with the reason."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from toppings.adapters.errors import AdapterError, AdapterNotFound
from toppings.adapters.layout import BaseShapes
from toppings.adapters.peft_config import CONFIG_FILE, PeftConfig, shorten
from toppings.adapters.peft_matches import PeftMatches
from toppings.adapters.regular_files import open_regular
from toppings.adapters.stored_tensors import FLOATS, WEIGHTS_FILE, StoredTensor, StoredTensors
from toppings.adapters.text_files import TEXT_FILES, TextFiles
from toppings.bad_input import RequestError, check_unicode, shown
from toppings.core import MODULES

if TYPE_CHECKING:
    import torch

__all__ = ["AdapterCheckpoint", "AdapterError", "AdapterNotFound", "fingerprint", "read_checkpoint"]

logger = logging.getLogger(__name__)

MAX_CONFIG_BYTES = 4 << 20
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_KEY = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>\d{1,6})\.(?:self_attn|mlp)\.(?P<name>\w{1,32}))"
    r"\.lora_(?P<half>[AB])(?:\.default)?\.weight",  # PEFT's own name of an adapter may stand in its keys
    re.ASCII,
)
_BASE_PARAMETER = re.compile(
    r"base_model\.model\.(?:lm_head|model\.(?:embed_tokens|norm|layers\.\d+\.(?:\w+layernorm|(?:self_attn|mlp)\."
    r"(?:[qk]_norm|\w+_proj(?:\.base_layer)?))))\.(?:weight|bias)"
)
_OUTSIDE_LAYERS = ("lm_head", "model.embed_tokens")


@dataclass(frozen=True)
class ProjectionWeights:
    """A `[r, in]` and B `[out, r]` as stored, and the scale still to be applied."""

    a: "torch.Tensor"
    b: "torch.Tensor"
    scale: float


@dataclass(frozen=True)
class AdapterCheckpoint:
    """A valid adapter for `shapes`. `weights` is keyed by (layer, `MODULES` index).

    `digest` is the SHA-256 of all that it is served by; `fingerprint` sizes and modification times of its
    files before they were read; `chat_template` its own, if it brings one; `invocation_tokens` those of an
    activated LoRA; `warnings` what was ignored.
    """

    path: Path
    base_model: str
    shapes: BaseShapes
    weights: Mapping[tuple[int, int], ProjectionWeights]
    digest: str
    fingerprint: str
    chat_template: str | None = None
    invocation_tokens: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    def ranks(self) -> list[list[int]]:
        """Per layer and `MODULES` index, 0 where not targeted."""
        ranks = [[0] * len(MODULES) for _ in range(self.shapes.num_layers)]
        for (layer, module), weights in self.weights.items():
            ranks[layer][module] = weights.a.shape[0]
        return ranks


def module_name(layer: int, module: int) -> str:
    """The base model's name of a projection, as peft's patterns see it."""
    block = "mlp" if MODULES[module] in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{MODULES[module]}"


def fingerprint(path: str | Path) -> str:
    """Sizes and modification times of the checkpoint's files: changes whenever they are written.

    Raises FileNotFoundError where its configuration or weights are missing.
    """
    stats = [os.stat(f"{path}/{CONFIG_FILE}"), os.stat(f"{path}/{WEIGHTS_FILE}")]
    for name in TEXT_FILES:
        with suppress(FileNotFoundError):
            stats.append(os.stat(f"{path}/{name}"))
    return ":".join(f"{stat.st_size}-{stat.st_mtime_ns}" for stat in stats)


def read_checkpoint(
    path: str | Path,
    shapes: BaseShapes,
    base_tokens: Mapping[str, int] | None = None,
    roots: Sequence[Path] | None = None,
) -> AdapterCheckpoint:
    """The adapter in the directory `path`, all of it in memory and checked against the base model's `shapes`.

    `base_tokens`: the added tokens of the base model's tokeniser, to warn where the adapter's differ.
    `roots`: its files must lie below one of these directories, with every link followed; None: anywhere.
    Warnings are logged, too. Raises AdapterError with the reason; AdapterNotFound where `path` is no
    directory.
    """
    path = Path(path).absolute()
    try:
        check_unicode("path", str(path))
    except RequestError as error:  # the registry could not keep it
        raise AdapterError(f"adapter {shown(ascii(str(path)))}: {error}; rename it") from error
    try:
        if not path.is_dir():
            raise AdapterNotFound(f"no adapter directory at {path}")
        _check_files(path)
        checkpoint = _read(path, shapes, base_tokens, roots)
    except OSError as error:
        raise AdapterError(f"cannot read adapter {path}: {error}") from error
    for warning in checkpoint.warnings:
        logger.warning("adapter %s: %s", path, warning)
    return checkpoint


def _read(
    path: Path, shapes: BaseShapes, base_tokens: Mapping[str, int] | None, roots: Sequence[Path] | None
) -> AdapterCheckpoint:
    mark = fingerprint(path)
    try:
        config_bytes = _read_config(path / CONFIG_FILE, roots)
        config = PeftConfig.read(config_bytes)
        digest = hashlib.sha256(len(config_bytes).to_bytes(8, "little") + config_bytes)
        with _naming(WEIGHTS_FILE), open_regular(path / WEIGHTS_FILE, roots) as file:
            stored = StoredTensors(file)
            plan = _Plan(stored.by_key, config, shapes)
            digest.update(stored.head)
            tensors = stored.read(plan.keys, digest.update)
        weights = plan.weights(tensors)
    except AdapterError as error:
        raise AdapterError(f"adapter {path}: {error}") from error
    text = TextFiles.read(path, roots)
    if text.chat_template is not None:
        digest.update(b"chat_template" + text.chat_template.encode("utf-8", "surrogatepass"))
    differences = text.differences(base_tokens) if base_tokens is not None else []
    return AdapterCheckpoint(
        path=path,
        base_model=config.base_model,
        invocation_tokens=config.invocation_tokens,
        shapes=shapes,
        weights=weights,
        digest=digest.hexdigest(),
        fingerprint=mark,
        chat_template=text.chat_template,
        warnings=(*config.warnings, *plan.warnings, *text.warnings, *differences),
    )


def _read_config(file: Path, roots: Sequence[Path] | None) -> bytes:
    with _naming(CONFIG_FILE), open_regular(file, roots) as stream:
        data = stream.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterError(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
    return data


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """What the system says of a failed read does not name the file."""
    try:
        yield
    except OSError as error:
        raise AdapterError(f"cannot read {name}: {error.strerror or error}") from error


def _check_files(path: Path) -> None:
    if not (path / CONFIG_FILE).is_file():
        raise AdapterError(f"adapter {path}: {CONFIG_FILE} is missing")
    if not (path / WEIGHTS_FILE).is_file():
        pickle = next((name for name in _PICKLES if (path / name).exists()), None)
        found = f"; {pickle} is a pickle, which is not read: convert it to safetensors" if pickle else ""
        raise AdapterError(f"adapter {path}: {WEIGHTS_FILE} is missing{found}")


class _Plan:
    """Which tensors are wanted and of what shape, decided by the header alone. Raises AdapterError."""

    def __init__(self, stored: Mapping[str, StoredTensor], config: PeftConfig, shapes: BaseShapes) -> None:
        places = [(layer, module) for layer in range(shapes.num_layers) for module in range(len(MODULES))]
        names = [module_name(*place) for place in places]
        self._matches = PeftMatches(config, (*names, *_OUTSIDE_LAYERS))
        self._halves: dict[tuple[int, int], tuple[str, str]] = {}
        _check_outside(self._matches, config)
        ignored = [key for key in stored if _is_ignored(key)]
        halves = _by_place([key for key in stored if not _is_ignored(key)], shapes)
        for place, name in zip(places, names, strict=True):
            keys = [halves.get((*place, half)) for half in "AB"]
            _check_presence(name, keys, self._matches)
            if keys[0] is not None and keys[1] is not None:
                rank, (size_in, size_out) = self._matches.rank_of(name), shapes.sizes[place[1]]
                _check_stored(stored[keys[0]], (rank, size_in))
                _check_stored(stored[keys[1]], (size_out, rank))
                self._halves[place] = (keys[0], keys[1])
        self.warnings = [*self._matches.unused_patterns()[:20], *map(_explain_ignored, ignored[:20])]

    @property
    def keys(self) -> list[str]:
        return [key for halves in self._halves.values() for key in halves]

    def weights(self, tensors: Mapping[str, "torch.Tensor"]) -> dict[tuple[int, int], ProjectionWeights]:
        """Raises AdapterError for values that are not finite."""
        for key, tensor in tensors.items():
            if not is_finite(tensor):
                raise AdapterError(f"key {key!r} holds NaN or infinite values")
        return {
            place: ProjectionWeights(tensors[a], tensors[b], self._matches.scale_of(module_name(*place)))
            for place, (a, b) in self._halves.items()
        }


def _check_outside(matches: PeftMatches, config: PeftConfig) -> None:
    is_shorthand = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    for name in _OUTSIDE_LAYERS:
        if not is_shorthand and matches.is_target(name):
            raise AdapterError(
                f"target_modules {shorten(config.target_modules)} matches {name}; supported: "
                f"{', '.join(MODULES)}"
            )


def _is_ignored(key: str) -> bool:
    """PEFT takes no note of a tensor that is no parameter of the model with its adapters; here, a LoRA's is
    refused all the same: it was trained, and would be missing.
    """
    return "lora_" not in key and _BASE_PARAMETER.fullmatch(key) is None


def _explain_ignored(key: str) -> str:
    return f"key {key[:200]!r} is no parameter of the base model; it is ignored, as PEFT ignores it"


def _by_place(keys: list[str], shapes: BaseShapes) -> dict[tuple[int, int, str], str]:
    halves: dict[tuple[int, int, str], str] = {}
    for key in keys:
        place = _parse_key(key, shapes)
        if place in halves:
            raise AdapterError(f"keys {halves[place]!r} and {key!r} are the same weight")
        halves[place] = key
    return halves


def _parse_key(key: str, shapes: BaseShapes) -> tuple[int, int, str]:
    match = _KEY.fullmatch(key)
    if match is None or match["name"] not in MODULES:
        raise AdapterError(f"key {shorten(key)} {_explain_key(key)}")
    layer, module = int(match["layer"]), MODULES.index(match["name"])
    if layer >= shapes.num_layers:
        raise AdapterError(f"key {key!r} is for layer {layer}; the base model has {shapes.num_layers} layers")
    if match["module"] != module_name(layer, module):
        raise AdapterError(f"key {key!r} matches nothing; expected {module_name(layer, module)}")
    return layer, module, match["half"]


def _explain_key(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return "belongs to DoRA, which is not supported"
    if "lora_embedding_" in key or "embed_tokens" in key or "lm_head" in key:
        return "is for the embedding or output layer, which is not supported"
    if "modules_to_save" in key or "lora_" not in key:
        return "is a whole weight, not a LoRA (modules_to_save is not supported)"
    if key.endswith(".bias"):
        return "is a bias, which is not supported"
    return f"matches no projection of the base model ({', '.join(MODULES)})"


def _check_presence(name: str, keys: list[str | None], matches: PeftMatches) -> None:
    for half, key, other in (("A", *keys), ("B", *keys[::-1])):
        if key is None and other is not None:
            raise AdapterError(f"key {other!r} has no lora_{half} beside it")
    if keys[0] is None and matches.is_target(name):
        raise AdapterError(f"target_modules names {name}, but the file has no weights for it")
    if keys[0] is not None and not matches.is_target(name):
        raise AdapterError(f"key {keys[0]!r} is not among the modules that the configuration targets")


def is_finite(tensor: "torch.Tensor") -> bool:
    """No value is NaN or infinite. By numpy, since torch would wake its threads for each small tensor."""
    import torch

    if tensor.dtype is torch.bfloat16:
        exponents = tensor.view(torch.int16).numpy() & 0x7F80
        return not bool((exponents == 0x7F80).any())
    return bool(np.isfinite(tensor.numpy()).all())


def _check_stored(stored: StoredTensor, shape: tuple[int, int]) -> None:
    if stored.shape != shape:
        raise AdapterError(
            f"key {stored.key!r} has shape {list(stored.shape)}; the base model and the configured rank need "
            f"{list(shape)}"
        )
    if stored.dtype not in FLOATS:
        kind = re.sub(r"^I(?=\d)", "int", stored.dtype[:32])
        raise AdapterError(f"key {stored.key!r} is of type {kind}; it must be a float of 8 to 64 bits")
