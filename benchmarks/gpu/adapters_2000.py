"""What do 2,000 registered adapters cost in throughput, against 5?

    python benchmarks/gpu/adapters_2000.py
    python benchmarks/gpu/adapters_2000.py --home disk       # asked for, adapters come from files
    python benchmarks/gpu/adapters_2000.py --toy --device cpu

One engine. The same requests, all at once, name 5 adapters in turn, then each another one of all, and again.
With `--home host` those that will be named are in host memory before, as all are where memory holds them:
2,000 of ranks 8 to 64 on q, k and v of Llama-2-7B are 94 GB, too many to read here. The device pool holds
`--pool` of the largest. The limit is the throughput with 5. Ends in one JSON line. Not yet run on a GPU.
"""

import random
import sys
import time
from collections.abc import Sequence

from common import Bench, finish, greedy, make_parser, median, note, open_bench, random_prompt, serve

from toppings.engine.engine import Engine
from toppings.lab.aims import at_least
from toppings.lab.players.engine import preload_host
from toppings.messages import AddRequest

RANKS = (8, 16, 32, 64)
FEW = 5
LARGEST_MODEL_LEN = 512


def tokens_per_s(
    engine: Engine, ids: Sequence[int], num_requests: int, num_prompt: int, num_out: int
) -> float:
    """Generated tokens; request i names adapter i of `ids`, in turn."""
    requests = [
        AddRequest(str(i), random_prompt(i, num_prompt), greedy(num_out), ids[i % len(ids)])
        for i in range(num_requests)
    ]
    started_at = time.perf_counter()
    serve(engine, requests)
    return num_requests * num_out / (time.perf_counter() - started_at)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--requests", type=int, default=128, help="of one round; each names another adapter")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pool", type=int, default=64, help="largest adapters that the pool holds")
    parser.add_argument("--home", choices=("host", "disk"), default="host")
    options = parser.parse_args()
    num_prompt, num_out, max_num_seqs = 64, 64, 64
    if options.toy:
        options.adapters, options.requests, options.rounds, options.pool = 40, 8, 1, 6
        num_prompt, num_out, max_num_seqs = 8, 4, 4
    with open_bench(options, max_num_seqs=max_num_seqs, max_model_len=LARGEST_MODEL_LEN) as bench:
        bench.register("adapter", options.adapters, ranks=RANKS)
        ids = bench.ids("adapter")
        num_named = min(options.requests * options.rounds, options.adapters)
        named = random.Random(0).sample(ids, num_named)
        results = run(bench, named, options.requests, options.rounds, num_prompt, num_out)
    few, many = median(results["few"]), median(results["many"])
    return finish(
        "adapters_2000",
        options,
        [at_least(f"throughput with {options.adapters} adapters over that with {FEW}", many / few, 0.93)],
        adapters=options.adapters,
        named=num_named,
        home=options.home,
        requests=options.requests,
        tokens_per_s=results,
        floor=few,
        adapter_bytes=bench.adapter_bytes,
    )


def run(
    bench: Bench, named: Sequence[int], num_requests: int, rounds: int, num_prompt: int, num_out: int
) -> dict[str, list[float]]:
    """Tokens per second of each round, with few adapters and with as many as requests."""
    sizes = {record.adapter_id: record.num_bytes for record in bench.records}
    few = bench.ids("adapter")[:FEW]
    host_bytes = sum(sizes[adapter_id] for adapter_id in {*named, *few}) + 2**23
    pool_bytes = bench.options.pool * max(sizes.values())
    results: dict[str, list[float]] = {"few": [], "many": []}
    with bench.engine("pipelined", device_pool_bytes=pool_bytes, host_store_bytes=host_bytes) as engine:
        in_memory = [*few, *named] if bench.options.home == "host" else few
        preload_host(engine.adapters, in_memory)
        tokens_per_s(engine, few, len(few), num_prompt, num_out)  # compiles and warms up
        for number in range(rounds):
            own = [named[(number * num_requests + i) % len(named)] for i in range(num_requests)]
            for name, ids in (("few", few), ("many", own)):
                results[name].append(tokens_per_s(engine, ids, num_requests, num_prompt, num_out))
                note("adapters_2000", bench.options, tokens_per_s=results)
    return results


if __name__ == "__main__":
    sys.exit(main())
