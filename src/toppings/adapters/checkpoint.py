"""Reads a PEFT LoRA checkpoint whole, or refuses it with the reason."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from toppings.adapters.errors import AdapterError, AdapterNotFound
from toppings.adapters.layout import BaseShapes
from toppings.adapters.peft_config import CONFIG_FILE, PeftConfig
from toppings.core import MODULES

__all__ = ["AdapterCheckpoint", "AdapterError", "AdapterNotFound", "fingerprint", "read_checkpoint"]

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_KEY = re.compile(
    r"base_model\.model\.(?P<module>model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<name>\w+))"
    r"\.lora_(?P<half>[AB])\.weight"
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class ProjectionWeights:
    """A `[r, in]` and B `[out, r]` as stored, and the scale still to be applied."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class AdapterCheckpoint:
    """A valid adapter for `shapes`. `weights` is keyed by (layer, `MODULES` index).

    `digest` is the SHA-256 of configuration and weights files; `fingerprint` their sizes and modification
    times before they were read.
    """

    path: Path
    base_model: str
    shapes: BaseShapes
    weights: Mapping[tuple[int, int], ProjectionWeights]
    digest: str
    fingerprint: str

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

    Raises FileNotFoundError where one is missing.
    """
    stats = (os.stat(f"{path}/{CONFIG_FILE}"), os.stat(f"{path}/{WEIGHTS_FILE}"))
    return ":".join(f"{stat.st_size}-{stat.st_mtime_ns}" for stat in stats)


def read_checkpoint(path: str | Path, shapes: BaseShapes) -> AdapterCheckpoint:
    """The adapter in the directory `path`, all of it in memory and checked against the base model's `shapes`.

    Raises AdapterError with the reason; AdapterNotFound where `path` is no directory.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise AdapterNotFound(f"no adapter directory at {path}")
    _check_files(path)
    try:
        mark = fingerprint(path)
        config_bytes = (path / CONFIG_FILE).read_bytes()
        weights_bytes = (path / WEIGHTS_FILE).read_bytes()
    except OSError as error:
        raise AdapterError(f"cannot read adapter {path}: {error}") from error
    try:
        config = PeftConfig.read(config_bytes)
        weights = _match_weights(_parse_tensors(weights_bytes), config, shapes)
    except AdapterError as error:
        raise AdapterError(f"adapter {path}: {error}") from error
    digest = hashlib.sha256(len(config_bytes).to_bytes(8, "little") + config_bytes)
    digest.update(weights_bytes)
    return AdapterCheckpoint(path, config.base_model, shapes, weights, digest.hexdigest(), mark)


def _check_files(path: Path) -> None:
    if not (path / CONFIG_FILE).is_file():
        raise AdapterError(f"adapter {path}: {CONFIG_FILE} is missing")
    if not (path / WEIGHTS_FILE).is_file():
        pickle = next((name for name in _PICKLES if (path / name).exists()), None)
        found = f"; {pickle} is a pickle, which is not read: convert it to safetensors" if pickle else ""
        raise AdapterError(f"adapter {path}: {WEIGHTS_FILE} is missing{found}")


def _parse_tensors(data: bytes) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{WEIGHTS_FILE} is truncated or corrupt: {error}") from error
    if not tensors:
        raise AdapterError(f"{WEIGHTS_FILE} holds no tensors")
    return tensors


def _match_weights(
    tensors: Mapping[str, torch.Tensor], config: PeftConfig, shapes: BaseShapes
) -> dict[tuple[int, int], ProjectionWeights]:
    places = [(layer, module) for layer in range(shapes.num_layers) for module in range(len(MODULES))]
    config.check_patterns(module_name(*place) for place in places)
    halves = {(*_parse_key(key, shapes), key[-8]): key for key in tensors}  # key[-8]: "A" or "B"
    weights = {}
    for layer, module in places:
        keys = [halves.get((layer, module, half)) for half in "AB"]
        name = module_name(layer, module)
        _check_presence(name, keys, config)
        if keys[0] is not None and keys[1] is not None:
            rank, (size_in, size_out) = config.rank_of(name), shapes.sizes[module]
            a = _check_tensor(keys[0], tensors[keys[0]], (rank, size_in))
            b = _check_tensor(keys[1], tensors[keys[1]], (size_out, rank))
            weights[layer, module] = ProjectionWeights(a, b, config.scale_of(name))
    return weights


def _parse_key(key: str, shapes: BaseShapes) -> tuple[int, int]:
    match = _KEY.fullmatch(key)
    if match is None or match["name"] not in MODULES:
        raise AdapterError(f"key {key!r} {_explain_key(key)}")
    layer, module = int(match["layer"]), MODULES.index(match["name"])
    if layer >= shapes.num_layers:
        raise AdapterError(f"key {key!r} is for layer {layer}; the base model has {shapes.num_layers} layers")
    if match["module"] != module_name(layer, module):
        raise AdapterError(f"key {key!r} matches nothing; expected {module_name(layer, module)}")
    return layer, module


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


def _check_presence(name: str, keys: list[str | None], config: PeftConfig) -> None:
    for half, key, other in (("A", *keys), ("B", *keys[::-1])):
        if key is None and other is not None:
            raise AdapterError(f"key {other!r} has no lora_{half} beside it")
    if keys[0] is None and config.is_target(name):
        raise AdapterError(f"target_modules names {name}, but the file has no weights for it")
    if keys[0] is not None and not config.is_target(name):
        raise AdapterError(f"key {keys[0]!r} is not among the modules that the configuration targets")


def is_finite(tensor: torch.Tensor) -> bool:
    """No value is NaN or infinite. By numpy, since torch would wake its threads for each small tensor."""
    if tensor.dtype is torch.bfloat16:
        exponents = tensor.view(torch.int16).numpy() & 0x7F80
        return not bool((exponents == 0x7F80).any())
    return bool(np.isfinite(tensor.numpy()).all())


def _check_tensor(key: str, tensor: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise AdapterError(
            f"key {key!r} has shape {list(tensor.shape)}; the base model and the configured rank need "
            f"{list(shape)}"
        )
    if tensor.dtype not in _FLOATS:
        raise AdapterError(f"key {key!r} is of type {tensor.dtype}; it must be a 16 to 64 bit float")
    if not is_finite(tensor):
        raise AdapterError(f"key {key!r} holds NaN or infinite values")
    return tensor
