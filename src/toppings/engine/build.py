"""An engine from its configuration: reads the model, sizes the cache, makes the pools."""

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from toppings.adapters.layout import DTYPE_BYTES
from toppings.adapters.manager import AdapterManager
from toppings.adapters.modes import LoadingMode, PipelinedMode, make_mode
from toppings.assist.cores import available_cores
from toppings.assist.cuda_stream_ops import failure_reason, unavailable_reason
from toppings.assist.modes import ASSIST_MODES, AssistMode
from toppings.assist.pool import NoWorkersError
from toppings.config import OFF, ConfigError, EngineConfig
from toppings.control_groups import memory_available
from toppings.engine.assist import Assist
from toppings.engine.base import (
    dtype_name,
    model_config,
    model_path,
    open_registry,
    served_model_name,
    state_dir,
)
from toppings.engine.block_hashes import BlockHasher
from toppings.engine.decode_form import choose_decode_form
from toppings.engine.decode_graphs import DecodeGraphs
from toppings.engine.drawing import DeviceSampler, Sampler, draw_on_host
from toppings.engine.engine import Engine
from toppings.engine.fold_policy import FoldPolicy
from toppings.engine.folded_base import FoldedBase
from toppings.engine.graphs import CudaGraphs, GraphBackend, GraphSpec
from toppings.engine.host_graphs import HostGraphs, can_record, recorded_sizes
from toppings.engine.lookup import LookupDrafts
from toppings.engine.memory import measure
from toppings.engine.merged_mode import MergedMode, make_meter
from toppings.engine.model_runner import ModelRunner
from toppings.engine.pages import PageAllocator, pages_for
from toppings.engine.products import choose_products
from toppings.engine.prompt_graphs import PromptGraphs
from toppings.engine.scheduler import Scheduler
from toppings.engine.scheduler_limits import FIXED_STEP_TOKENS, SchedulerLimits
from toppings.engine.scoring import DeviceReader, Reader, read_on_host
from toppings.engine.staging import Staging
from toppings.engine.step_inputs import InputBuilder
from toppings.engine.step_log import StepLog
from toppings.engine.structures import Structures
from toppings.grammar.compiler import Compiler
from toppings.messages import EngineReady
from toppings.model.config import ModelConfig
from toppings.model.decoder import Decoder
from toppings.model.dummy import dummy_weights
from toppings.model.part_decoder import PartDecoder
from toppings.model.parts import Part
from toppings.ops import dispatch, warm_up
from toppings.ops.attention import KVCache
from toppings.ops.huge_pages import use_huge_pages
from toppings.ops.lora import LoraForm

if TYPE_CHECKING:
    from toppings.engine.parallel import Followers

logger = logging.getLogger(__name__)

MAX_DEFAULT_CACHE_BYTES = 4 * 2**30


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
    path, quantization = model_path(config), config.quantization
    return Decoder.load(path, config=model, dtype=dtype, device=config.device, quantization=quantization)


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
    staging: Staging | None,
    decode_form: LoraForm,
) -> ModelRunner:
    inputs = InputBuilder(config.page_size, staging)
    is_cuda = staging is not None and config.device == "cuda"
    draw: Sampler = draw_on_host
    read: Reader = read_on_host
    if staging is not None and is_cuda:
        draw, read = DeviceSampler(staging, torch.cuda), DeviceReader(staging, torch.cuda)
    runs_ahead = config.async_scheduling == "on" or (config.async_scheduling == "auto" and is_cuda)
    return ModelRunner(
        decoder,
        cache,
        adapters,
        mode,
        inputs=inputs,
        sample=draw,
        read=read,
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
    if config.device == "cpu":
        _prepare_host(decoder)
    limits, num_pages = _limits(config, own, _cache_bytes(config, decoder))
    cache = make_cache(config, own, num_pages, decoder.dtype)
    mode = _make_mode(config)
    await_registry()
    lead = None if followers is None else followers.lead()
    adapters = AdapterManager(open_registry(config), config, mode, lead)
    if followers is not None:
        followers.begin(num_pages, adapters)
    # Without Triton, LoRA takes the host's word for who is in a batch, which no graph can follow.
    has_kernels = followers is None and config.device == "cuda" and "cuda" in dispatch.TRITON_DEVICES
    if graphs is None and has_kernels and config.cuda_graphs != "off" and not model.has_experts:
        graphs = CudaGraphs()  # not yet tried with experts
    staging = make_staging(config, decoder, has_graphs=graphs is not None)
    decode_form = choose_decode_form(config, own, decoder.dtype)
    runner = make_runner(config, decoder, cache, adapters, mode, staging, decode_form)
    runner.rows.structures = structures
    sizes = (config.max_num_seqs, limits.max_num_batched_tokens, limits.max_model_len)
    spec = GraphSpec(*sizes, num_pages, runner.out_offsets, decode_form, config.merged_mode != OFF)
    if graphs is not None and staging is not None:
        parts = (decoder, cache, adapters.pool, spec, staging, graphs)
        runner.graphs = [DecodeGraphs(*parts)]
        # Attention on the host takes the host's word for where prompts are, which no graph can follow.
        if config.cuda_graphs == "on" and dispatch.gpu_kernels("attention", cache.k[0]) is not None:
            runner.graphs = [*runner.graphs, PromptGraphs(*parts)]
    elif followers is None and can_record(decoder):
        parts = (decoder, cache, adapters.pool, spec, Staging(decoder.device, None), HostGraphs())
        runner.graphs = [DecodeGraphs(*parts, recorded_sizes(config.max_num_seqs))]
    if has_kernels:
        from toppings.engine.compile_steps import compile_steps  # needs Triton

        inputs = InputBuilder(config.page_size, staging)
        compile_steps(decoder, cache, adapters.pool, inputs, spec)
        runner.dry_draw()
    assist = None
    if isinstance(mode, AssistMode):
        try:
            assist = runner.assist = Assist(config, mode, adapters, runner, state_dir(config))
        except NoWorkersError as error:
            logger.warning("mode %s acts as pipelined: %s", config.mode, error)
    adapters.start()
    pages = PageAllocator(num_pages, config.page_size, double_cost_len=model.double_cost_len)
    names = BlockHasher(config.page_size) if config.enable_prefix_caching == "on" else None
    drafts = LookupDrafts(config.num_speculative_tokens) if config.speculative_method == "ngram" else None
    scheduler = Scheduler(limits, pages, adapters, names, drafts)
    return Engine(
        _ready(config, model, limits, num_pages, decode_form),
        scheduler,
        runner if followers is None else followers.leading(runner, adapters),
        adapters,
        eos_token_ids=model.eos_token_ids,
        step_log=StepLog(config.step_log, config.max_log_bytes),
        assist=assist,
        followers=followers,
        structures=structures,
        merged=_make_merged(config, decoder, adapters, scheduler, runner, decode_form),
    )


def _prepare_host(decoder: Decoder) -> None:
    """Before anything else of size is taken, which might lie between weights."""
    if num_bytes := use_huge_pages(span for each in decoder.products() for span in each.spans()):
        logger.info("%d MiB of memory with weights are in huge pages now", num_bytes >> 20)
    warm_up(decoder.dtype, decoder.quantized_kinds())


def _make_merged(
    config: EngineConfig,
    decoder: Decoder,
    adapters: AdapterManager,
    scheduler: Scheduler,
    runner: ModelRunner,
    form: LoraForm,
) -> MergedMode | None:
    """None where it is off. Raises ConfigError where the model's weights cannot be changed, or no copy of
    them fits."""
    if config.merged_mode == OFF:
        return None
    try:
        folded = FoldedBase(decoder, adapters.pool, runner.out_offsets, form)
    except ValueError as error:
        raise ConfigError(f"merged_mode is {config.merged_mode!r}, but {error}; use off") from error
    policy = FoldPolicy(config.merged_mode_half_life_s)
    meter = make_meter(decoder, adapters, folded, runner.out_offsets, form)
    merged = MergedMode(folded, adapters, scheduler, policy, meter, memory_available)
    runner.folded = folded
    return merged


def _ready(
    config: EngineConfig, model: ModelConfig, limits: SchedulerLimits, num_pages: int, decode_form: LoraForm
) -> EngineReady:
    return EngineReady(
        model_name=served_model_name(config),
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        vocab_size=model.vocab_size,
        page_size=config.page_size,
        num_pages=num_pages,
        device_pool_bytes=config.device_pool_bytes,
        host_store_bytes=config.host_store_bytes,
        decode_lora_form=decode_form if config.device == "cuda" else "",
        hidden_size=model.hidden_size,
    )


def _make_mode(config: EngineConfig) -> LoadingMode:
    """Where the device's memory is the host's and no link is emulated, `auto` needs no profile or workers."""
    if config.mode == "auto" and config.tensor_parallel_size > 1:
        logger.info("mode auto acts as pipelined: a split model has no CPU assistance")
        return PipelinedMode()
    if config.mode == "auto" and config.device == "cpu" and not config.link_gbps:
        return PipelinedMode()
    is_asked = config.mode in ASSIST_MODES and config.device == "cuda"
    if is_asked and (reason := unavailable_reason() or failure_reason()):
        logger.warning("mode %s acts as pipelined: %s", config.mode, reason)
        return PipelinedMode()
    return ASSIST_MODES[config.mode]() if config.mode in ASSIST_MODES else make_mode(config.mode)


def _cache_bytes(config: EngineConfig, decoder: Decoder) -> int:
    """The memory set aside for the cache. Raises ConfigError where a GPU has none left."""
    if config.kv_cache_bytes:
        return config.kv_cache_bytes
    if config.tensor_parallel_size > 1 and config.device == "cuda":
        raise ConfigError("a model that is split over GPUs needs kv_cache_bytes, for each of them")
    if config.device != "cuda":
        return default_cache_bytes()
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
        scheduling_policy=config.scheduling_policy,
        fixed_step_tokens=FIXED_STEP_TOKENS[config.device],
    )
    return limits, min(num_pages, config.max_num_seqs * pages_for(max_model_len, config.page_size))


def default_cache_bytes() -> int:
    """Of the key-value cache on the CPU, where none are configured."""
    return min(_memory_bytes() // 8, MAX_DEFAULT_CACHE_BYTES)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
