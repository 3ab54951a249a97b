"""An engine from its configuration: reads the model, sizes the cache, opens the registry and the pools."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from toppings.adapters.capacity import Capacity
from toppings.adapters.layout import BLOCK_ALIGNMENT_BYTES, DTYPE_BYTES, BaseShapes
from toppings.adapters.manager import AdapterManager
from toppings.adapters.modes import LoadingMode, PipelinedMode, make_mode
from toppings.adapters.registry import AdapterRegistry
from toppings.adapters.rows import check_rows
from toppings.adapters.state_lock import StateLock
from toppings.adapters.text_files import base_tokens
from toppings.assist.cores import available_cores
from toppings.assist.cuda_stream_ops import unavailable_reason
from toppings.assist.modes import ASSIST_MODES, AssistMode
from toppings.config import ConfigError, EngineConfig
from toppings.core import EngineReady
from toppings.engine.assist import Assist
from toppings.engine.decode_form import choose_decode_form
from toppings.engine.drawing import DeviceSampler, draw_on_host
from toppings.engine.engine import Engine
from toppings.engine.graphs import CudaGraphs, DecodeGraphs, GraphBackend, GraphSpec
from toppings.engine.memory import measure
from toppings.engine.model_runner import ModelRunner
from toppings.engine.pages import PageAllocator, pages_for
from toppings.engine.products import choose_products
from toppings.engine.scheduler import Scheduler, SchedulerLimits
from toppings.engine.staging import Staging
from toppings.engine.step_inputs import InputBuilder
from toppings.engine.step_log import StepLog
from toppings.engine.structures import Structures
from toppings.grammar.compiler import Compiler
from toppings.model.config import ModelConfig
from toppings.model.decoder import Decoder
from toppings.model.dummy import NAMED_MODELS, dummy_weights, named_config
from toppings.model.files import read_json
from toppings.model.identity import checkpoint_identity
from toppings.model.part_decoder import PartDecoder
from toppings.model.parts import Part
from toppings.ops import dispatch, warm_up
from toppings.ops.attention import KVCache
from toppings.ops.lora import LoraForm
from toppings.sources.models import cache_dir, find_model

if TYPE_CHECKING:
    from toppings.engine.parallel import Followers

logger = logging.getLogger(__name__)

IDENTITY_CHARS = 12  # of a base model's identity in the name of its default state directory
MAX_DEFAULT_CACHE_BYTES = 4 * 2**30


def model_path(config: EngineConfig) -> Path:
    """Raises ValueError for a model that cannot be found or made."""
    return find_model(config.model, config.state_dir).path


def model_config(config: EngineConfig) -> ModelConfig:
    """Of the checkpoint, or of a name for which no checkpoint is needed."""
    if config.load_format == "dummy" and config.model in NAMED_MODELS:
        return named_config(config.model)
    return ModelConfig.from_checkpoint(model_path(config))


def load_decoder(config: EngineConfig, model: ModelConfig, part: Part | None = None) -> Decoder:
    """The model, or one part of it. Raises ValueError where it cannot be read."""
    dtype = getattr(torch, dtype_name(config, model))
    if part is not None:
        if config.load_format == "dummy":
            return PartDecoder.dummy_part(part, dtype, config.device, seed=config.seed)
        return PartDecoder.load_part(model_path(config), model, part, dtype, config.device)
    if config.load_format == "dummy":
        weights = dummy_weights(model, dtype, config.device, seed=config.seed)
        return Decoder(model, weights, quantization=config.quantization)
    return Decoder.load(
        model_path(config), dtype=dtype, device=config.device, quantization=config.quantization
    )


def make_cache(config: EngineConfig, model: ModelConfig, num_pages: int, dtype: torch.dtype) -> KVCache:
    """For a model, or the part of one that `model` describes."""
    return KVCache.allocate(
        model.num_layers,
        num_pages + 1,  # the last one is no sequence's: rows that pad a batch write there
        config.page_size,
        model.num_kv_heads,
        model.head_dim,
        dtype,
        config.device,
    )


def make_staging(config: EngineConfig, decoder: Decoder, *, has_graphs: bool = False) -> Staging | None:
    """None where the device is the host and nothing else asks for it."""
    cuda = torch.cuda if config.device == "cuda" else None
    return None if cuda is None and not has_graphs else Staging(decoder.device, cuda)


def make_runner(
    config: EngineConfig,
    decoder: Decoder,
    cache: KVCache,
    adapters: AdapterManager,
    mode: LoadingMode,
    max_model_len: int,
    staging: Staging | None,
    decode_form: LoraForm,
) -> ModelRunner:
    inputs = InputBuilder(config.page_size, max_model_len, staging)
    is_cuda = staging is not None and config.device == "cuda"
    draw = DeviceSampler(staging, torch.cuda) if staging is not None and is_cuda else draw_on_host
    runs_ahead = config.async_scheduling == "on" or (config.async_scheduling == "auto" and is_cuda)
    return ModelRunner(
        decoder,
        cache,
        adapters,
        mode,
        inputs=inputs,
        sample=draw,
        runs_ahead=runs_ahead,
        decode_form=decode_form,
    )


def set_threads(config: EngineConfig) -> None:
    """The processes of a split model share the cores where no number is given."""
    num_threads = config.num_threads
    if config.tensor_parallel_size > 1 and not num_threads:
        num_threads = max(1, len(available_cores()) // config.tensor_parallel_size)
    if num_threads:
        torch.set_num_threads(num_threads)


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
            BaseShapes(*model.base_shapes()),
            dtype_name(config, model),
            identity=base_identity(config),
            base_names=base_names(config),
            is_strict=config.strict_base == "on",
            capacity=_capacity(config),
            lock=lock,
        )
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    registry.compare_tokens(base_tokens(Path(model_path(config))))
    return registry


def _capacity(config: EngineConfig) -> Capacity:
    """Of a split model's parts together, which is more than an adapter's uneven parts may use."""
    pool_bytes, host_bytes = (
        size // BLOCK_ALIGNMENT_BYTES * BLOCK_ALIGNMENT_BYTES
        for size in (config.device_pool_bytes, config.host_store_bytes)
    )
    return Capacity(pool_bytes * config.tensor_parallel_size, host_bytes)


def build_engine(
    config: EngineConfig,
    *,
    await_registry: Callable[[], None] = lambda: None,
    graphs: GraphBackend | None = None,
) -> Engine:
    """An engine that is ready to step. `await_registry` is called with the model loaded, before the registry
    is opened, and returns when adapters to be served from the start are registered. `graphs` captures decode
    steps, by default where the device can.

    Raises ValueError, OSError or ConfigError where the model or a setting cannot be served.
    """
    set_threads(config)
    torch.manual_seed(config.seed)
    if config.tensor_parallel_size == 1:
        return _build_engine(config, await_registry, None, graphs)
    from toppings.engine.parallel import Followers  # needs msgspec

    followers = Followers.start(config, model_config(config))
    try:
        return _build_engine(config, await_registry, followers, None)
    except BaseException:
        followers.close()
        raise


def _build_engine(
    config: EngineConfig,
    await_registry: Callable[[], None],
    followers: "Followers | None",
    graphs: GraphBackend | None,
) -> Engine:
    model = model_config(config)
    part = None if followers is None else followers.lead_part
    own = model if part is None else part.config  # what this process has of it
    choose_products(config, own, getattr(torch, dtype_name(config, model)), state_dir(config))
    structures = Structures(Compiler(model_path(config), model.vocab_size, model.eos_token_ids))
    decoder = load_decoder(config, model, part)
    warm_up(decoder.dtype, config.quantization)
    limits, num_pages = _limits(config, own, _cache_bytes(config, decoder))
    cache = make_cache(config, own, num_pages, decoder.dtype)
    mode = _make_mode(config)
    await_registry()
    lead = None if followers is None else followers.lead()
    adapters = AdapterManager(open_registry(config), config, mode, lead)
    if followers is not None:
        followers.begin(num_pages, limits.max_model_len, adapters)
    # Without Triton, LoRA takes the host's word for who is in a batch, which no graph can follow.
    can_capture = followers is None and config.device == "cuda" and "cuda" in dispatch.TRITON_DEVICES
    if graphs is None and can_capture and config.cuda_graphs == "on":
        graphs = CudaGraphs()
    staging = make_staging(config, decoder, has_graphs=graphs is not None)
    decode_form = choose_decode_form(config, own, decoder.dtype)
    runner = make_runner(config, decoder, cache, adapters, mode, limits.max_model_len, staging, decode_form)
    runner.rows.structures = structures
    if graphs is not None and staging is not None:
        sizes = (config.max_num_seqs, limits.max_model_len)
        spec = GraphSpec(*sizes, num_pages, runner.out_offsets, decode_form)
        runner.graphs = DecodeGraphs(decoder, cache, adapters.pool, spec, staging, graphs)
    assist = None
    if isinstance(mode, AssistMode):
        assist = runner.assist = Assist(config, mode, adapters, runner, state_dir(config))
    adapters.start()
    info = EngineReady(
        model_name=served_model_name(config),
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        vocab_size=model.vocab_size,
        page_size=config.page_size,
        num_pages=num_pages,
        device_pool_bytes=config.device_pool_bytes,
        host_store_bytes=config.host_store_bytes,
        decode_lora_form=decode_form if config.device == "cuda" else "",
    )
    return Engine(
        info,
        Scheduler(limits, PageAllocator(num_pages, config.page_size), adapters),
        runner if followers is None else followers.leading(runner, adapters),
        adapters,
        eos_token_ids=model.eos_token_ids,
        step_log=StepLog(config.step_log, config.max_log_bytes),
        assist=assist,
        followers=followers,
        structures=structures,
    )


def _make_mode(config: EngineConfig) -> LoadingMode:
    """Where the device's memory is the host's and no link is emulated, `auto` needs no profile or workers."""
    if config.mode == "auto" and config.tensor_parallel_size > 1:
        logger.info("mode auto acts as pipelined: a split model has no CPU assistance")
        return PipelinedMode()
    if config.mode == "auto" and config.device == "cpu" and not config.link_gbps:
        return PipelinedMode()
    if config.mode in ASSIST_MODES and config.device == "cuda" and (reason := unavailable_reason()):
        logger.warning("mode %s acts as pipelined: %s", config.mode, reason)
        return PipelinedMode()
    return ASSIST_MODES[config.mode]() if config.mode in ASSIST_MODES else make_mode(config.mode)


def dtype_name(config: EngineConfig, model: ModelConfig) -> str:
    return str(model.dtype).removeprefix("torch.") if config.dtype == "auto" else config.dtype


def _cache_bytes(config: EngineConfig, decoder: Decoder) -> int:
    """The memory set aside for the cache. Raises ConfigError where a GPU has none left."""
    if config.kv_cache_bytes:
        return config.kv_cache_bytes
    if config.tensor_parallel_size > 1 and config.device == "cuda":
        raise ConfigError("a model that is split over GPUs needs kv_cache_bytes, for each of them")
    if config.device != "cuda":
        return min(_memory_bytes() // 8, MAX_DEFAULT_CACHE_BYTES)
    memory = measure(decoder, config, torch.cuda)
    pool_bytes = config.device_pool_bytes
    return memory.cache_bytes(utilization=config.gpu_memory_utilization, pool_bytes=pool_bytes)


def _limits(config: EngineConfig, model: ModelConfig, cache_bytes: int) -> tuple[SchedulerLimits, int]:
    """Limits and number of cache pages: as many as `cache_bytes` hold, no more than could be used.

    Raises ConfigError where max_model_len is beyond the model's positions or the cache's size.
    """
    token_bytes = 2 * model.num_layers * model.kv_size * DTYPE_BYTES[dtype_name(config, model)]
    num_pages = cache_bytes // (token_bytes * config.page_size)
    num_tokens, num_positions = num_pages * config.page_size, model.max_position_embeddings
    max_model_len = config.max_model_len or min(num_positions, num_tokens)
    if max_model_len > num_positions:
        raise ConfigError(f"max_model_len is {max_model_len}; the model has {num_positions} positions")
    if not 2 <= max_model_len <= num_tokens:
        raise ConfigError(
            f"max_model_len is {max_model_len}, but a cache of {cache_bytes} bytes holds {num_tokens} tokens;"
            " raise kv_cache_bytes or lower max_model_len"
        )
    limits = SchedulerLimits(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        max_adapter_wait_s=config.max_adapter_wait_s,
    )
    return limits, min(num_pages, config.max_num_seqs * pages_for(max_model_len, config.page_size))


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
