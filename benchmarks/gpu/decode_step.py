"""How near is a decode step of the engine to the bytes that it must read?

    python benchmarks/gpu/decode_step.py                     # Llama-2-7B's shape, batch 32, context 512
    python benchmarks/gpu/decode_step.py --graphs off        # the same, operator by operator
    python benchmarks/gpu/decode_step.py --toy --device cpu  # does it run? The built-in model

An engine in this process, greedy, the base model alone. The floor is the weights that every step reads and
the keys and values of all contexts, over the bandwidth of a copy (bytes read and written) measured in the
same run. Ends in one JSON line. Not yet run on a GPU.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from math import prod

import torch

from toppings.config import EngineConfig
from toppings.core import AddRequest, SamplingParams
from toppings.engine.build import build_engine, model_config
from toppings.engine.engine import Engine
from toppings.model.config import ModelConfig
from toppings.model.weights import weight_shapes

WARM_UP_STEPS = 3


def copy_gbps(device: str, num_bytes: int) -> float:
    """10^9 bytes read and written per second; the fastest of a few copies."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        _synchronize(device)
        started_at = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        times.append(time.perf_counter() - started_at)
    return 2 * num_bytes / min(times) / 1e9


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def step_bytes(model: ModelConfig, context_tokens: int) -> int:
    weights = sum(prod(shape) for name, shape in weight_shapes(model).items() if name != "embed")
    if model.tie_word_embeddings:
        weights += model.vocab_size * model.hidden_size
    return model.dtype.itemsize * (weights + 2 * model.num_layers * model.kv_size * context_tokens)


def time_steps_ms(engine: Engine, batch: int, context: int, num_steps: int, vocab_size: int) -> float:
    """Median step in which all of the batch decodes, each sequence `context` tokens or a little longer."""
    params = SamplingParams(temperature=0.0, max_tokens=num_steps + WARM_UP_STEPS + batch, ignore_eos=True)
    for i in range(batch):
        prompt = [(i + j) % vocab_size for j in range(context)]
        assert engine.add(AddRequest(str(i), prompt, params)) is None
    started: set[str] = set()
    while len(started) < batch:
        started |= {output.request_id for output in engine.step()}
    times = []
    for _ in range(WARM_UP_STEPS + num_steps):
        started_at = time.perf_counter()
        assert len(engine.step()) == batch
        times.append((time.perf_counter() - started_at) * 1e3)
    engine.abort_all("timed")
    return statistics.median(times[WARM_UP_STEPS:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-2-7b", help="a known shape")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--graphs", choices=("on", "off"), default="on")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--toy", action="store_true", help="the built-in model, few steps")
    options = parser.parse_args()
    batch, context, num_steps = (3, 20, 4) if options.toy else (options.batch, options.context, 60)
    with tempfile.TemporaryDirectory() as state_dir:
        config = EngineConfig(
            model="" if options.toy else options.model,
            load_format="auto" if options.toy else "dummy",
            device=options.device,
            cuda_graphs=options.graphs,
            mode="pipelined",
            max_num_seqs=max(64, batch),
            state_dir=state_dir,
        )
        model, engine = model_config(config), build_engine(config)
        step_ms = time_steps_ms(engine, batch, context, num_steps, model.vocab_size)
        engine.close()
    gbps = copy_gbps(options.device, 2**22 if options.toy else 2**30)
    floor_ms = step_bytes(model, batch * context) / gbps / 1e6
    result = {
        "benchmark": "decode_step",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "model": config.model or "built-in",
        "graphs": options.graphs,
        "batch": batch,
        "context": context,
        "copy_gbps": gbps,
        "step_ms": step_ms,
        "floor_ms": floor_ms,
        "ratio": step_ms / floor_ms,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
