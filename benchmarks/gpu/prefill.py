"""How much of the matrix rate does a long prompt's prefill reach, and what does LoRA on everything add?

    python benchmarks/gpu/prefill.py                     # 2,048 tokens, Llama-2-7B's shape
    python benchmarks/gpu/prefill.py --toy --device cpu

One step of an engine in this process that computes one prompt, without an adapter and with one of rank 64 on
every projection, in turns. The limit is the rate of a square bfloat16 product measured in the same run; the
operations of projections and causal attention are counted. Ends in one JSON line. Not yet run on a GPU.
"""

import sys

from common import ALL_LINEAR, Bench, finish, make_parser, matmul_tflops, median, note, open_bench

from toppings.adapters.layout import DTYPE_BYTES
from toppings.cluster.batch_row import BatchRow
from toppings.lab.aims import at_least, at_most
from toppings.lab.batches.driver import BatchDriver
from toppings.model.config import ModelConfig

RANK = 64


def operations(model: ModelConfig, num_tokens: int) -> float:
    """Of one prefill without adapters, the last token's logits included."""
    num_layers, sizes = model.base_shapes()
    products = num_tokens * sum(num_in * num_out for num_in, num_out in sizes)
    attention = 2 * BatchRow(0, num_tokens=num_tokens).num_attended * model.q_size
    return 2 * (num_layers * (products + attention) + model.hidden_size * model.vocab_size)


def time_prefills(bench: Bench, num_tokens: int, rounds: int) -> dict[str, float]:
    """Median ms by case."""
    with bench.engine("cached", cuda_graphs="off") as engine:
        driver = BatchDriver(engine, {record.name: record.adapter_id for record in bench.records})
        adapter = bench.records[0].name
        rows = {"base": BatchRow(0, None, num_tokens), "lora": BatchRow(RANK, adapter, num_tokens)}
        times: dict[str, list[float]] = {name: [] for name in rows}
        for number in range(rounds + 2):  # the first two rounds warm up
            for name, row in rows.items():
                steps = driver.prefill_ms((row,))
                times[name] += steps if number >= 2 else []
            so_far = {name: median(values) for name, values in times.items() if values}
            note("prefill", bench.options, tokens=num_tokens, rounds=number, prefill_ms=so_far)
    return {name: median(values) for name, values in times.items()}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    num_tokens, rounds = (64, 2) if options.toy else (options.tokens, options.rounds)
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": num_tokens}
    with open_bench(options, async_scheduling="off", **settings) as bench:
        bench.register("all", 1, ranks=(RANK,), targets=ALL_LINEAR)
        ms = time_prefills(bench, num_tokens, rounds)
        num_operations = operations(bench.model, num_tokens)
        lora_operations = 2 * num_tokens * bench.adapter_bytes / DTYPE_BYTES[bench.model.dtype]
    limit = matmul_tflops(options)
    floor_ms = num_operations / limit / 1e9
    aims = [
        at_least("share of the matrix rate", floor_ms / ms["base"], 0.6),
        at_most(
            f"prefill with rank {RANK} on all projections over one without", ms["lora"] / ms["base"], 1.1
        ),
    ]
    return finish(
        "prefill",
        options,
        aims,
        tokens=num_tokens,
        matmul_tflops=limit,
        prefill_ms=ms,
        floor_ms=floor_ms,
        tflops=num_operations / ms["base"] / 1e9,
        lora_floor=1 + lora_operations / num_operations,
    )


if __name__ == "__main__":
    sys.exit(main())
