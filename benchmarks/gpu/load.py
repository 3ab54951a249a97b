"""Do adapters come to the device as fast as the link allows?

    python benchmarks/gpu/load.py                     # rank 64 on q, k and v, and on every projection
    python benchmarks/gpu/load.py --toy --device cpu

The engine's own host store, pool and loader: from the moment an adapter is asked for until all its layers
are on the device. The pool holds one adapter, and each is evicted before it is asked for again. The limit is
a copy from page-locked memory measured in the same run. Ends in one JSON line. Not yet run on a GPU.
"""

import sys
from typing import Any

from common import (
    ALL_LINEAR,
    QKV,
    Bench,
    bring_to_device,
    finish,
    host_copy_gbps,
    make_parser,
    median,
    note,
    open_bench,
)

from toppings.lab.aims import at_least
from toppings.lab.players.engine import preload_host

KINDS = {"qkv": QKV, "all": ALL_LINEAR}
RANK = 64


def time_loads(bench: Bench, kind: str, rounds: int) -> list[float]:
    """10^9 bytes per second of each load."""
    num_bytes = bench.kinds[kind][0].num_bytes
    ids = bench.ids(kind)
    settings: dict[str, Any] = {"device_pool_bytes": num_bytes, "cuda_graphs": "off"}
    settings |= {"max_model_len": 256, "max_num_seqs": 4}
    with bench.engine("pipelined", **settings) as engine:
        preload_host(engine.adapters, ids)
        for adapter_id in ids:  # not counted
            bring_to_device(engine, adapter_id)
        times = [bring_to_device(engine, adapter_id) for _ in range(rounds) for adapter_id in ids]
        loads = engine.adapters.counters()["adapter_loads"]
        assert loads == len(times) + len(ids), "an adapter was still on the device"
    return [num_bytes / seconds / 1e9 for seconds in times]


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    rounds = 2 if options.toy else options.rounds
    with open_bench(options) as bench:
        for kind, targets in KINDS.items():
            bench.register(kind, 2, ranks=(RANK,), targets=targets)
        gbps: dict[str, float] = {}
        for kind in KINDS:
            gbps[kind] = median(time_loads(bench, kind, rounds))
            note("load", options, load_gbps=gbps)
        num_bytes = {kind: bench.kinds[kind][0].num_bytes for kind in KINDS}
    limit = host_copy_gbps(options)
    aims = [
        at_least(f"load of rank {RANK} on {kind}, share of the page-locked copy", gbps[kind] / limit, 0.9)
        for kind in KINDS
    ]
    return finish(
        "load",
        options,
        aims,
        host_copy_gbps=limit,
        load_gbps=gbps,
        load_ms={kind: num_bytes[kind] / gbps[kind] / 1e6 for kind in KINDS},
        floor_ms={kind: num_bytes[kind] / limit / 1e6 for kind in KINDS},
        adapter_bytes=num_bytes,
    )


if __name__ == "__main__":
    sys.exit(main())
