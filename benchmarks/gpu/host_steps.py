"""What does a step cost the host, and is anything compiled once an engine is ready? Needs no GPU.

    python benchmarks/gpu/host_steps.py                      # Llama-2-7B's shape
    python benchmarks/gpu/host_steps.py --toy                # does it run?

The model, its cache and the adapters' pool are on torch's device "meta", whose tensors have no values. Triton
works out each launch as ever and is then told that it is compiled; nothing is. Counted:

* the kinds of kernels that an engine asks for until it is ready, and those that random steps ask for after
  that: of prompts and decodes, of every length, adapters of every rank. There should be none.
* launches of Triton kernels and operators of torch for one step of a kind, and processor time of the host.
  What the driver takes of it, about 5 us for each launch, is not in it, nor are the sampler's operators, of
  which "meta" works out shapes in Python. A replayed graph is one launch.

Ends in one JSON line; exits with 1 where something is compiled late.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from compile_kernels import H100_MULTIPROCESSORS, FakeDriver
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from toppings.adapters.device_pool import DevicePool
from toppings.adapters.layout import AdapterLayout, BaseShapes
from toppings.adapters.modes import PipelinedMode
from toppings.core import GROUPS, MODULES, Batch, BatchItem, Request
from toppings.engine.compile_steps import compile_steps
from toppings.engine.decode_graphs import DecodeGraphs
from toppings.engine.drawing import Drawing
from toppings.engine.graphs import GraphSpec
from toppings.engine.model_runner import ModelRunner
from toppings.engine.prompt_graphs import PromptGraphs
from toppings.engine.staging import Staging
from toppings.engine.step_inputs import InputBuilder
from toppings.model.config import ModelConfig
from toppings.model.decoder import Decoder
from toppings.model.named import NAMED_MODELS, named_config
from toppings.model.weights import weight_shapes
from toppings.ops import dispatch, gpu_launch
from toppings.ops.attention import KVCache
from toppings.ops.device_sampling import SamplingPlan, draw
from toppings.ops.lora import DEFAULT_DECODE_FORM, LoraForm
from toppings.ops.sampling import SampleOutput, SamplingRow
from toppings.sampling_params import SamplingParams

META = torch.device("meta")
PAGE_SIZE = 16
MAX_LEN, MAX_SEQS, MAX_TOKENS = 4096, 64, 2048
TOY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
RANKS = (1, 8, 13, 16, 64, 100, 512)
ALL = range(len(MODULES))
TARGETS: tuple[Sequence[int], ...] = (GROUPS["qkv"], GROUPS["o"], GROUPS["down"], ALL)
REPEATS = 8


class Launched:
    """A kernel that is said to be compiled; its launches do nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: Any) -> None:
        """None is asked for."""

    def run(self, *arguments: Any) -> None:
        """Its first launch."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.run


class Kinds:
    """The kinds of kernels that Triton was asked to compile. `is_known`: later launches of a kind go straight
    to it; else each is worked out by Triton."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, Any]] = set()
        self.by_our_kind: dict[tuple[str, Any], set[Any]] = {}
        self.is_known = False
        JITFunction._do_compile = self._compile
        ours, self._last = gpu_launch.Kernel._kind_of, None

        def noted(*arguments: Any) -> Any:
            self._last = ours(*arguments)
            return self._last

        patch.object(gpu_launch.Kernel, "_kind_of", noted).start()

    @property
    def confused(self) -> list[str]:
        """Kernels of which a kind of ours is more than one of Triton's."""
        return sorted(name for (name, _), keys in self.by_our_kind.items() if len(keys) > 1)

    @property
    def _compile(self) -> Any:
        def compile_nothing(function: Any, key: Any, *_: Any, **__: Any) -> Launched | None:
            self.seen.add((function.__name__, key))
            self.by_our_kind.setdefault((function.__name__, self._last), set()).add(key)
            return Launched() if self.is_known else None

        return compile_nothing


class Operators(TorchDispatchMode):
    """Counts operators that would be launches."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += not (function.is_view or function.overloadpacket.__name__.startswith("empty"))
        return function(*args, **(kwargs or {}))


class Capture:
    """A `GraphBackend` that captures by calling, and replays nothing."""

    def capture(self, run: Callable[[], None]) -> Any:
        run()
        return SimpleNamespace(replay=lambda: None)


class World:
    """A model runner as an engine makes it, up to where it is ready."""

    def __init__(
        self,
        model: ModelConfig,
        dtype: torch.dtype = torch.bfloat16,
        decode_form: LoraForm = DEFAULT_DECODE_FORM,
    ) -> None:
        shapes = BaseShapes(*model.base_shapes())
        staging = Staging(META, None)
        self.staging = staging
        self.draws = True
        pool, self.slots = _pool(shapes, dtype)
        adapters: Any = SimpleNamespace(pool=pool, slot_of=self.slots.get, load_of=lambda _: None)
        with META:
            weights = {name: torch.empty(shape, dtype=dtype) for name, shape in weight_shapes(model).items()}
            decoder = Decoder(model, weights)
        sizes = (PAGE_SIZE, model.num_kv_heads, model.head_dim)
        cache = KVCache.allocate(model.num_layers, MAX_LEN // PAGE_SIZE + 1, *sizes, dtype, META)
        inputs = InputBuilder(PAGE_SIZE, staging)
        self.runner = ModelRunner(decoder, cache, adapters, PipelinedMode(), inputs=inputs, sample=self.draw)
        spec = GraphSpec(
            MAX_SEQS, MAX_TOKENS, MAX_LEN, MAX_LEN // PAGE_SIZE, self.runner.out_offsets, decode_form
        )
        parts = (decoder, cache, pool, spec, staging, Capture())
        self.runner.graphs = [DecodeGraphs(*parts), PromptGraphs(*parts)]
        compile_steps(decoder, cache, pool, inputs, spec)
        self.runner.dry_draw()

    def draw(self, logits: Tensor, rows: list[SamplingRow]) -> Drawing:
        plan = SamplingPlan.of(rows, logits.shape[1])
        arrays = self.staging.bring(plan.arrays)
        drawn = draw(logits, plan, arrays) if rows and self.draws else [logits]
        return Drawing(drawn[0], lambda: SampleOutput([0] * len(rows), [None] * len(rows)))


def _pool(shapes: BaseShapes, dtype: torch.dtype) -> tuple[DevicePool, dict[int, int]]:
    """With an adapter of each kind; slots by adapter id."""
    kinds = [[rank if m in targets else 0 for m in ALL] for rank in RANKS for targets in TARGETS]
    name = str(dtype).removeprefix("torch.")
    layouts = [AdapterLayout.build([ranks] * shapes.num_layers, shapes, name) for ranks in kinds]
    num_bytes = sum(layout.num_bytes for layout in layouts) + (1 << 20)
    pool = DevicePool(shapes.num_layers, num_bytes, dtype, num_slots=len(layouts))
    slots = [pool.try_place(layout) for layout in layouts]
    pool.arena, pool.table, pool.columns = (
        torch.empty_like(x, device=META) for x in (pool.arena, pool.table, pool.columns)
    )
    return pool, {i: slot for i, slot in enumerate(slots) if slot is not None}


def item(name: str, num_queries: int, context: int, adapter_id: int | None, **sampling: Any) -> BatchItem:
    """The last `num_queries` of `context` tokens."""
    params = SamplingParams(**{"max_tokens": 99, "temperature": 0.0, **sampling})
    computed = context - num_queries
    request = Request(name, [0] * context, params, adapter_id, num_computed_tokens=computed)
    request.page_table = list(range(-(-context // PAGE_SIZE)))
    return BatchItem(request, num_queries)


def random_batch(world: World, rng: random.Random) -> Batch:
    ids = [None, *world.slots]
    num_decodes = rng.choice([0, 1, 3, rng.randrange(MAX_SEQS - 4)])
    kinds: list[dict[str, Any]] = [{}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "min_p": 0.1}]
    items = [
        item(f"d{i}", 1, rng.randrange(2, MAX_LEN), rng.choice(ids), **rng.choice(kinds))
        for i in range(num_decodes)
    ]
    for i in range(rng.randrange(0 if items else 1, 4)):
        num_queries = rng.choice([1, 5, 17, rng.randrange(1, 600)])
        context = num_queries + rng.choice([0, rng.randrange(1, MAX_LEN - num_queries)])
        items.append(item(f"p{i}", num_queries, context, rng.choice(ids)))
    return Batch(sorted(items, key=lambda i: (not i.is_decode, -1 if i.adapter_id is None else i.adapter_id)))


def steps(world: World) -> dict[str, Batch]:
    """Kinds of steps whose cost is counted."""
    last = max(world.slots)  # on all projections
    decodes = [item(f"d{i}", 1, 500, last - i % 2, temperature=1.0, top_p=0.9) for i in range(MAX_SEQS - 1)]
    return {
        "64 decodes with adapters": Batch([*decodes, item("d", 1, 500, last)]),
        "a prompt of 128": Batch([item("p", 128, 128, None)]),
        "a prompt of 128 with an adapter": Batch([item("p", 128, 128, last)]),
        "a prompt of 128 and 63 decodes, all with adapters": Batch([*decodes, item("p", 128, 128, last)]),
        "a prompt of 2,048 with an adapter": Batch([item("p", 2048, 2048, last)]),
    }


def cost(world: World, kinds: Kinds, batch: Batch) -> dict[str, float]:
    kinds.is_known = False
    launches = 0

    def count(*_: Any, **__: Any) -> None:
        nonlocal launches
        launches += 1

    with patch.object(gpu_launch.Kernel, "__call__", count), Operators() as operators:
        world.runner.start(batch)
    kinds.is_known, world.draws = True, False
    times = []
    for _ in range(REPEATS):
        began_at = time.thread_time()
        world.runner.start(batch)
        times.append(time.thread_time() - began_at)
    world.draws = True
    return {"launches": launches, "operators": operators.num, "host_ms": min(times) * 1e3}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=NAMED_MODELS, default="llama-2-7b")
    parser.add_argument("--random-steps", type=int, default=60)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(FakeDriver(90))
    dispatch.TRITON_DEVICES = (META.type,)
    gpu_launch.MULTIPROCESSORS_WITHOUT_GPU = H100_MULTIPROCESSORS
    kinds = Kinds()
    world = World(named_config(options.model, **TOY) if options.toy else named_config(options.model))
    at_start, rng = set(kinds.seen), random.Random(0)
    for _ in range(options.random_steps):
        world.runner.start(random_batch(world, rng))
    late, confused = sorted(name for name, _ in kinds.seen - at_start), kinds.confused
    costs = {name: cost(world, kinds, batch) for name, batch in steps(world).items()}
    for name, each in costs.items():
        print(f"{name:52}", *(f"{key} {value:8.4g}" for key, value in each.items()))
    found = {"num_kinds": len(at_start), "late": late, "confused": confused, "steps": costs}
    print(json.dumps({"benchmark": "host_steps", **found}))
    return 1 if late or confused else 0


if __name__ == "__main__":
    sys.exit(main())
