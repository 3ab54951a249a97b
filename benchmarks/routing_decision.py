"""What a routing decision costs, by policy and number of instances.

Instances have 16 requests each (a quarter waiting), of four ranks, and an extended performance model, the
dearest to evaluate. `rank_aware of K` decides among K candidates that are drawn. Beside the decisions stands
what one account costs: enqueue, start, finish.
The aim is 50 us at 60 instances and 1 ms at 1,000 for rank_aware. Ends in one JSON line.
"""

import random
import time
from collections.abc import Callable
from functools import partial

from toppings.cluster.fleet import Fleet
from toppings.cluster.perf_model import DECODE_FORMS, PREFILL_FORMS, LinearModel, PerfModel
from toppings.cluster.policies import POLICIES, PolicySettings, make_policy
from toppings.cluster.snapshot import InstanceSnapshot, RequestSnapshot
from toppings.lab.script import finish, make_parser, parse

RANKS = (8, 16, 32, 64)
NUM_ADAPTERS = 512
REQUESTS_PER_INSTANCE = 16
EXTENDED = PerfModel(
    origin="made up, every feature in use",
    decode_forms={"extended": LinearModel(dict.fromkeys(DECODE_FORMS["extended"], 0.01))},
    prefill_forms={"extended": LinearModel(dict.fromkeys(PREFILL_FORMS["extended"], 0.01))},
    decode_form="extended",
    prefill_form="extended",
    link_gbps=24.0,
)


def make_request(generator: random.Random, request_id: str) -> RequestSnapshot:
    number = generator.randrange(NUM_ADAPTERS)
    rank = RANKS[number % len(RANKS)]
    return RequestSnapshot(
        request_id, f"adapter-{number}", rank, generator.randint(16, 512), 128.0, rank << 20
    )


def make_fleet(num_instances: int, seed: int = 0) -> Fleet:
    generator = random.Random(seed)
    fleet = Fleet()
    for i in range(num_instances):
        requests = [make_request(generator, f"{i}-{j}") for j in range(REQUESTS_PER_INSTANCE)]
        held = frozenset(request.adapter for request in requests if request.adapter is not None)
        cut = REQUESTS_PER_INSTANCE // 4
        fleet.add_instance(
            InstanceSnapshot(
                instance_id=f"instance-{i}",
                perf_model=EXTENDED,
                running=tuple(requests[cut:]),
                waiting=tuple(requests[:cut]),
                on_device=held,
                kv_tokens_total=64_000.0,
                max_num_seqs=64.0,
            )
        )
    return fleet


def time_us(action: Callable[[], object], num_calls: int) -> float:
    """The least of seven rounds' mean processor time of a call: what else runs only adds to it."""
    rounds = []
    for _ in range(7):
        started_at = time.process_time()
        for _ in range(num_calls):
            action()
        rounds.append((time.process_time() - started_at) / num_calls * 1e6)
    return min(rounds)


def account_life(fleet: Fleet, request: RequestSnapshot) -> None:
    instance_id = fleet.ids[0]
    fleet.enqueue(instance_id, request)
    fleet.start(instance_id, request.request_id)
    fleet.finish(instance_id, request.request_id)


def main() -> None:
    options = parse(make_parser(__doc__, "few instances and calls"))
    is_toy = options.toy
    results: dict[str, dict[str, float]] = {}
    for num_instances in (4, 8) if is_toy else (60, 1000, 10_000):
        fleet = make_fleet(num_instances)
        request = make_request(random.Random(1), "new")
        num_calls = 5 if is_toy else 100_000 // (num_instances + 40)
        row = results[str(num_instances)] = {}
        for name in POLICIES:
            policy = make_policy(name, PolicySettings(slo_tpt_ms=1000.0))
            row[name] = time_us(partial(policy.choose, request, fleet), num_calls)
        for candidates in (2, 8):
            policy = make_policy("rank_aware", PolicySettings(slo_tpt_ms=1000.0, candidates=candidates))
            name = f"rank_aware of {candidates}"
            row[name] = time_us(partial(policy.choose, request, fleet), num_calls)
        row["account"] = time_us(partial(account_life, fleet, request), num_calls)
        for name, cost_us in row.items():
            print(f"{num_instances:5d} instances  {name:22s} {cost_us:9.1f} us")
    finish(options, "routing_decision", us=results)


if __name__ == "__main__":
    main()
