"""A step of an engine on a device that is not the host: torch's "meta", whose tensors have no values.

No operator may mix devices or look at values, and what stands in for the Triton kernels checks the place of
everything that they would read.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.adapters.test_device_pool import layout
from tests.ops.test_device_sampling import check_no_look_back
from toppings.adapters.device_pool import DevicePool
from toppings.adapters.modes import PipelinedMode
from toppings.core import Batch, BatchItem, Request
from toppings.engine.decode_graphs import DecodeGraphs
from toppings.engine.drawing import DeviceSampler
from toppings.engine.graphs import GraphSpec
from toppings.engine.model_runner import ModelRunner
from toppings.engine.prompt_graphs import PromptGraphs
from toppings.engine.scoring import DeviceReader
from toppings.engine.staging import Array, Staging, packed_bytes, unpack
from toppings.engine.step_inputs import InputBuilder
from toppings.model.config import ModelConfig
from toppings.model.decoder import Decoder
from toppings.model.weights import weight_shapes
from toppings.ops import dispatch
from toppings.ops.attention import AttentionMetadata, KVCache
from toppings.ops.lora import LoraSegments
from toppings.ops.sampling import SampleOutput
from toppings.sampling_params import SamplingParams

GPU = torch.device("meta")
PAGE_SIZE = 4


def assert_on_gpu(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.device == GPU, f"a kernel would read {tuple(tensor.shape)} on {tensor.device}"


class OneDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where an operator reads from two devices, or the host from the device, but by an open copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if name in ("to", "_to_copy") and kwargs.get("non_blocking") and kwargs["device"].type == "cpu":
            return torch.empty(args[0].shape, dtype=args[0].dtype)
        assert len(devices) < 2, f"{name} mixes {devices}"
        if GPU.type in devices:
            check_no_look_back(name, args)
        return func(*args, **kwargs)


class Kernels:
    """The modules `toppings.ops.gpu_*`, as far as places matter."""

    calls: set[str]

    def __init__(self) -> None:
        self.calls = set()

    def _see(self, name: str) -> Callable[..., None]:
        def kernel(*operands: Any) -> None:
            self.calls.add(name)
            assert_on_gpu(*(x for x in operands if isinstance(x, Tensor)))

        return kernel

    def __getattr__(self, name: str) -> Callable[..., None]:
        return self._see(name)

    def paged_attention(self, *tensors: Any, scale: float, window: int, **_: Any) -> None:
        meta: AttentionMetadata = tensors[-1]
        self.calls.add("paged_attention")
        assert meta.brought is not None, "its inputs come in a copy of their own"
        tiles = meta.tiles
        assert_on_gpu(*tensors[:-1], meta.page_tables, meta.slot_mapping)
        assert_on_gpu(tiles.context_lens, tiles.prefill_tiles, tiles.prefill_indptr)
        assert_on_gpu(tiles.splits, tiles.split_indptr)

    def add_lora(
        self, y: Tensor, x: Tensor, arena: Tensor, places: Tensor, offsets: Any, segments: LoraSegments
    ) -> None:
        self.calls.add("add_lora")
        assert_on_gpu(y, x, arena, places, segments.batches[GPU].chunks)


class FakeStaging(Staging):
    """What a copy brings is on the device, as far as it has values."""

    def __init__(self) -> None:
        self.device = GPU
        self.num_copies = 0

    def copy(self, arrays: Sequence[Array], target: Tensor) -> None:
        assert_on_gpu(target)
        assert target.numel() >= packed_bytes(arrays)
        self.num_copies += packed_bytes(arrays) > 0

    def bring(self, arrays: Sequence[Array]) -> list[Tensor]:
        target = torch.empty(packed_bytes(arrays), dtype=torch.uint8, device=GPU)
        self.copy(arrays, target)
        return unpack(target, arrays)


@dataclass
class World:
    runner: ModelRunner
    staging: FakeStaging
    kernels: Kernels
    drawn: list[list[Tensor]]


class Graphs:
    """Captures by calling; replays nothing."""

    def capture(self, run: Callable[[], None]) -> Any:
        run()
        return SimpleNamespace(replay=lambda: None)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    kernels, drawn = Kernels(), []
    monkeypatch.setattr(dispatch, "gpu_kernels", lambda name, sample: kernels)
    for module in ("attention", "lora", "norm", "rope", "activation"):
        monkeypatch.setattr(f"toppings.ops.{module}.gpu_kernels", lambda name, sample: kernels)

    def to_output(plan: Any, rows: Any, parts: Any) -> Any:
        drawn.append(parts)
        return SampleOutput([0] * len(rows), [None] * len(rows))

    monkeypatch.setattr("toppings.engine.drawing.to_output", to_output)
    uniform = "toppings.ops.device_sampling.draw_uniform"
    monkeypatch.setattr(uniform, lambda rows: SimpleNamespace(numpy=lambda: np.zeros(len(rows))))
    pool = DevicePool(3, 1 << 16, torch.float32, num_slots=4)
    slots = {7: pool.try_place(layout(8, 0b1000111))}
    adapters: Any = SimpleNamespace(pool=pool, slot_of=slots.get, load_of=lambda _: None)
    config = tiny_config()
    with OneDevice():  # type: ignore[no-untyped-call]
        pool.arena, pool.table = (
            torch.empty(x.shape, dtype=x.dtype, device=GPU) for x in (pool.arena, pool.table)
        )
        shapes = weight_shapes(config).items()
        decoder = Decoder(config, {name: torch.empty(shape, device=GPU) for name, shape in shapes})
        cache = KVCache.allocate(3, 9, PAGE_SIZE, 2, 16, torch.float32, GPU)
        staging = FakeStaging()
        cuda = SimpleNamespace(Event=lambda: SimpleNamespace(record=int, synchronize=int))
        sampler, reader = DeviceSampler(staging, cuda), DeviceReader(staging, cuda)
        inputs = InputBuilder(PAGE_SIZE, staging)
        runner = ModelRunner(
            decoder, cache, adapters, PipelinedMode(), inputs=inputs, sample=sampler, read=reader
        )
        spec = GraphSpec(4, 64, 32, 8, runner.out_offsets)
        runner.graphs = [DecodeGraphs(decoder, cache, pool, spec, staging, Graphs())]
        staging.num_copies = 0
        kernels.calls.clear()
        yield World(runner, staging, kernels, drawn)


def tiny_config() -> ModelConfig:
    from transformers import AutoConfig

    source = AutoConfig.for_model(
        "qwen3",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return ModelConfig.from_transformers(source, "Qwen3ForCausalLM")


def item(name: str, num_prompt: int, num_computed: int, adapter_id: int | None, **sampling: Any) -> BatchItem:
    params = SamplingParams(**{"max_tokens": 9, **sampling})
    request = Request(name, list(range(num_prompt)), params, adapter_id, num_computed_tokens=num_computed)
    request.page_table = list(range(-(-num_prompt // PAGE_SIZE)))
    return BatchItem(request, num_prompt - num_computed)


DRAWN = {
    "top_k": 5,
    "top_p": 0.9,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "min_tokens": 2,
    "stop_token_ids": (3,),
    "logprobs": 2,
    "seed": 1,
}


def test_a_mixed_step_stays_on_the_device_and_takes_one_copy(world: World) -> None:
    batch = Batch(
        [
            item("a", 9, 8, None, temperature=0.0),
            item("b", 6, 5, 7),
            item("c", 11, 4, 7),
            item("d", 3, 0, None),
        ]
    )
    world.runner.start(batch).result()
    assert {"paged_attention", "add_lora", "rotate_and_store", "silu_mul"} <= world.kernels.calls
    assert world.staging.num_copies == 2  # the step's inputs; what its rows ask of the sampler
    (drawn,) = world.drawn
    assert drawn[0].shape == (4,)


def test_every_kind_of_draw_stays_on_the_device(world: World) -> None:
    kinds: list[dict[str, Any]] = [
        DRAWN,
        {"top_p": 0.5},
        {"min_p": 0.1},
        {},
        {"temperature": 0.0, "logprobs": 0},
    ]
    world.runner.start(Batch([item(str(i), 5, 0, None, **kind) for i, kind in enumerate(kinds)])).result()
    (drawn,) = world.drawn
    assert [part.shape[0] for part in drawn] == [5, 5, 2, 2, 2, 2, 0]  # no token is named


def test_reading_prompts_stays_on_the_device_and_takes_one_copy_more(world: World) -> None:
    batch = Batch(
        [
            item("drawn", 9, 8, None, temperature=0.0),
            item("scored", 11, 4, 7, prompt_logprobs=2, max_tokens=0),
            item("scored and drawn", 6, 0, 7, prompt_logprobs=1, temperature=0.0),
            item("pooled", 5, 0, None, pooling="mean", max_tokens=0),
        ]
    )
    readings = world.runner.start(batch).result().readings
    assert world.staging.num_copies == 2
    assert {name: (r.start, len(r.logprobs)) for name, r in readings.items()} == {
        "scored": (4, 6),
        "scored and drawn": (0, 5),
        "pooled": (0, 0),
    }
    assert [name for name, reading in readings.items() if reading.total is not None] == ["pooled"]


def test_a_replayed_step_stays_on_the_device_and_takes_one_copy(world: World) -> None:
    world.runner.start(Batch([item(f"{i}", 9, 8, 7, temperature=0.0) for i in range(3)])).result()
    assert not world.kernels.calls  # nothing was queued but the graph
    assert world.staging.num_copies == 1
    (drawn,) = world.drawn
    assert drawn[0].shape == (3,)


def test_a_replayed_step_with_a_prompt_stays_on_the_device_and_takes_one_copy(world: World) -> None:
    runner, staging = world.runner, world.staging
    spec = GraphSpec(4, 64, 32, 8, runner.out_offsets)
    parts = (runner._decoder, runner._cache, runner._adapters.pool, spec, staging, Graphs())
    runner.graphs = [*runner.graphs, PromptGraphs(*parts)]
    assert {"paged_attention", "add_lora", "rotate_and_store", "silu_mul"} <= world.kernels.calls
    world.kernels.calls.clear()
    staging.num_copies = 0
    runner.start(Batch([item("a", 9, 8, 7, temperature=0.0), item("b", 11, 4, 7, temperature=0.0)])).result()
    assert not world.kernels.calls
    assert staging.num_copies == 1
    (drawn,) = world.drawn
    assert drawn[0].shape == (2,)


def test_the_check_finds_what_it_is_there_to_find(world: World) -> None:
    meta = AttentionMetadata(0, [0, 1], [1], torch.zeros(1, 1), torch.zeros(1), 4)
    with pytest.raises(AssertionError, match="a copy of their own"):
        world.kernels.paged_attention(meta, scale=1.0, window=1)
    on_gpu = torch.empty(3, device=GPU)
    with pytest.raises(AssertionError, match="embedding mixes"):
        torch.nn.functional.embedding(torch.zeros(1, dtype=torch.int64), on_gpu[:, None])
    with pytest.raises(AssertionError, match="waits for the device"):
        on_gpu[0].item()
    with pytest.raises(AssertionError, match="waits for the device"):
        on_gpu[on_gpu > 0]


@pytest.mark.parametrize("has_prompt", [False, True])
def test_a_step_takes_tokens_from_the_device_that_the_host_does_not_know(
    world: World, has_prompt: bool
) -> None:
    """Replayed, and with a chunk of a prompt queued operator by operator."""
    items = [item(f"{i}", 9, 8, 7, temperature=0.0) for i in range(3)]
    flight = world.runner.start(Batch(items))
    num_copies = world.staging.num_copies
    for decode in items:
        decode.request.num_computed_tokens += 1
        decode.request.num_pending_tokens = 1
        decode.request.page_table = [0, 1, 2]
    following = [BatchItem(decode.request, 1) for decode in reversed(items)]
    chunk = [item("prompt", 11, 4, 7)] if has_prompt else []
    world.runner.start(Batch(following + chunk), flight)
    assert world.staging.num_copies == num_copies + 1 + has_prompt  # the prompt's token is not the likeliest
    assert ("rotate_and_store" in world.kernels.calls) == has_prompt
    assert not world.drawn, "nobody waited"
