"""The base model and the adapters registered for it, as every process sees them. Needs no torch, unless the
model's configuration is read for the first time."""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from toppings.adapters.base_weights import BaseWeights
from toppings.adapters.capacity import Capacity
from toppings.adapters.layout import BLOCK_ALIGNMENT_BYTES, BaseShapes
from toppings.adapters.registry import AdapterRegistry
from toppings.adapters.rows import check_rows
from toppings.adapters.state_lock import StateLock
from toppings.config import EngineConfig
from toppings.model.config import ModelConfig
from toppings.model.files import read_json
from toppings.model.identity import checkpoint_identity
from toppings.model.named import NAMED_MODELS, named_config
from toppings.model.remembered import cache_dir
from toppings.sources.models import find_model

IDENTITY_CHARS = 12  # of a base model's identity in the name of its default state directory


def model_path(config: EngineConfig) -> Path:
    """Raises ValueError for a model that cannot be found or made."""
    return find_model(config.model, config.state_dir).path


def model_config(config: EngineConfig) -> ModelConfig:
    """Of the checkpoint, or of a name for which no checkpoint is needed."""
    if config.load_format == "dummy" and config.model in NAMED_MODELS:
        return named_config(config.model)
    return ModelConfig.from_checkpoint(model_path(config)).for_length(config.max_model_len)


def served_model_name(config: EngineConfig) -> str:
    return config.served_model_name or _model_name(config)


def _model_name(config: EngineConfig) -> str:
    if config.load_format == "dummy" and config.model in NAMED_MODELS:
        return config.model
    return find_model(config.model, config.state_dir).name


def base_identity(config: EngineConfig) -> str:
    """Of the base model's weights and configuration. Raises ValueError where they cannot be read."""
    try:
        if config.load_format != "dummy":
            return checkpoint_identity(model_path(config))
        if config.model in NAMED_MODELS:
            shape = json.dumps(NAMED_MODELS[config.model], sort_keys=True).encode()
        else:
            shape = (model_path(config) / "config.json").read_bytes()
    except OSError as error:
        raise ValueError(f"{model_path(config)} is not a Hugging Face checkpoint: {error}") from error
    return hashlib.sha256(b"dummy %d %s" % (config.seed, shape)).hexdigest()


def base_names(config: EngineConfig) -> set[str]:
    """What adapters' configurations may call the base model."""
    names = {served_model_name(config), str(model_path(config)), str(model_path(config).resolve())}
    with suppress(ValueError):
        names.add(str(read_json(model_path(config) / "config.json").get("_name_or_path") or ""))
    return names


def state_dir(config: EngineConfig) -> Path:
    """Where the registry and the packed adapters of this base model are kept.

    The default is one's own for each base model, by its content, and each dtype that is asked for. Raises
    ValueError where the base model cannot be read.
    """
    if config.state_dir:
        return Path(config.state_dir)
    parts = [_model_name(config).rpartition("/")[2], base_identity(config)[:IDENTITY_CHARS]]
    return cache_dir() / "-".join(parts if config.dtype == "auto" else [*parts, config.dtype])


def hold_state(config: EngineConfig, purpose: str, *, is_shared: bool = False) -> StateLock:
    """The right to write to the state directory, alone or with others that share it knowingly.

    `purpose`: what another process is told that wants it, too. Raises StateHeldError, StateError (also for a
    registry that is damaged), ValueError.
    """
    directory = state_dir(config)
    lock = StateLock.take(directory, purpose, is_shared=is_shared)
    try:
        check_rows(directory)
    except BaseException:
        lock.close()
        raise
    return lock


def open_registry(config: EngineConfig, lock: StateLock | None = None) -> AdapterRegistry:
    """The registry closes `lock` with itself; without one, whoever opens it reads, or writes knowing that
    others do not.

    Raises ValueError where the model is not supported or the state belongs to another base model; StateError.
    """
    try:
        model = model_config(config)
        registry = AdapterRegistry(
            state_dir(config),
            served_model_name(config),
            BaseShapes(*model.base_shapes(), model.is_fused, model.mixture),
            dtype_name(config, model),
            identity=base_identity(config),
            base_names=base_names(config),
            is_strict=config.strict_base == "on",
            capacity=_capacity(config),
            weights=base_weights(config, model),
            lock=lock,
        )
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    return registry


def base_weights(config: EngineConfig, model: ModelConfig) -> BaseWeights | None:
    """None for a model of random weights, which no file holds."""
    if config.load_format == "dummy":
        return None
    return BaseWeights(Path(model_path(config)), dtype_name(config, model), model.tie_word_embeddings)


def _capacity(config: EngineConfig) -> Capacity:
    """Of a split model's parts together, which is more than an adapter's uneven parts may use."""
    pool_bytes, host_bytes = (
        size // BLOCK_ALIGNMENT_BYTES * BLOCK_ALIGNMENT_BYTES
        for size in (config.device_pool_bytes, config.host_store_bytes)
    )
    return Capacity(pool_bytes * config.tensor_parallel_size, host_bytes)


def dtype_name(config: EngineConfig, model: ModelConfig) -> str:
    return model.dtype if config.dtype == "auto" else config.dtype
