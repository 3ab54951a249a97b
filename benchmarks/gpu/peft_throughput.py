"""Tokens per second against transformers + PEFT on the same device: 32 requests with 8 adapters.

    python benchmarks/gpu/peft_throughput.py                     # Llama-2-7B's shape
    python benchmarks/gpu/peft_throughput.py --toy --device cpu

Both have random weights of the same shapes and adapters of rank 16 on q, k and v on the device, and generate
as many tokens for prompts of one length, greedily, in one batch: PEFT with an adapter name a prompt
(`adapter_names`). First ours, then theirs, each after a warm-up; the best round of each counts. The floor is
the time of as many decode steps at the bandwidth of a copy. Ends in one JSON line. Needs peft. Not yet run on
a GPU.
"""

import argparse
import sys
from typing import Any

import torch
from common import (
    QKV,
    Bench,
    copy_gbps,
    finish,
    free_device,
    greedy,
    make_parser,
    note,
    open_bench,
    progress,
    random_prompt,
    serve,
    step_bytes,
    timed_s,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from toppings.demo import demo_model_dir
from toppings.lab.aims import at_least
from toppings.lab.transformers_side import generate
from toppings.messages import AddRequest
from toppings.model.named import NAMED_MODELS

NUM_ADAPTERS = 8
RANK = 16


def ours_s(bench: Bench, prompts: list[list[int]], num_out: int, rounds: int) -> float:
    """Seconds of the fastest round."""
    ids = bench.ids("adapter")
    requests = [
        AddRequest(str(i), prompt, greedy(num_out), ids[i % len(ids)]) for i, prompt in enumerate(prompts)
    ]
    with bench.engine("cached") as engine:
        times = [timed_s(lambda: serve(engine, requests), bench.options.device) for _ in range(rounds + 1)]
    return min(times[1:])


def theirs_s(options: argparse.Namespace, prompts: list[list[int]], num_out: int, rounds: int) -> float:
    free_device(options.device)
    model = random_peft_model(options)
    names = [f"adapter-{i % NUM_ADAPTERS}" for i in range(len(prompts))]
    times = []
    for _ in range(rounds + 1):
        times.append(timed_s(lambda: generate(model, prompts, num_out, names), options.device))
        progress(f"transformers + PEFT: {times[-1]:.2f} s")
    return min(times[1:])


def random_peft_model(options: argparse.Namespace) -> Any:
    """Made on the device, so that no weights travel."""
    if options.toy:
        config = AutoConfig.from_pretrained(demo_model_dir())
    else:
        fields = {"dtype": "bfloat16", **NAMED_MODELS[options.model]}
        config = AutoConfig.for_model("llama", **fields)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(QKV), init_lora_weights=False)
        adapted = get_peft_model(model, lora, adapter_name="adapter-0", autocast_adapter_dtype=False)
        for i in range(1, NUM_ADAPTERS):
            adapted.add_adapter(f"adapter-{i}", lora, autocast_adapter_dtype=False)
    return adapted.to(options.device).eval()


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if options.toy:
        options.requests, options.prompt, options.tokens, options.rounds = 8, 12, 4, 1
    prompts = [random_prompt(i, options.prompt) for i in range(options.requests)]
    with open_bench(options, max_num_seqs=options.requests, max_model_len=1024) as bench:
        bench.register("adapter", NUM_ADAPTERS, ranks=(RANK,))
        ours = ours_s(bench, prompts, options.tokens, options.rounds)
        context = options.requests * (options.prompt + options.tokens // 2)
        num_bytes = step_bytes(bench.model, context) + bench.adapter_bytes
    note("peft_throughput", options, tokens_per_s={"ours": options.requests * options.tokens / ours})
    floor_s = options.tokens * num_bytes / copy_gbps(options) / 1e9
    theirs = theirs_s(options, prompts, options.tokens, options.rounds)
    num_tokens = options.requests * options.tokens
    return finish(
        "peft_throughput",
        options,
        [at_least("tokens per second over transformers + PEFT", theirs / ours, 8.0)],
        requests=options.requests,
        adapters=NUM_ADAPTERS,
        tokens_per_s={"ours": num_tokens / ours, "peft": num_tokens / theirs},
        floor_tokens_per_s=num_tokens / floor_s,
    )


if __name__ == "__main__":
    sys.exit(main())
