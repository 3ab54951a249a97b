"""The servers and routers of a simulation, from its settings."""

import math
from collections.abc import Sequence

from toppings.cluster.dispatcher import Dispatcher
from toppings.cluster.placement import PlacementSettings, make_placement
from toppings.cluster.policies import PolicySettings, make_policy
from toppings.cluster.snapshot import InstanceSnapshot
from toppings.sim.arrivals import Arrivals
from toppings.sim.blocks import TraceNames
from toppings.sim.instance import Instance
from toppings.sim.settings import NS_PER_S, SimConfig
from toppings.sim.trace import Trace

SEED_STRIDE = 1_000_003
"""Between the seeds of routers of one run."""


def make_instances(config: SimConfig, trace: Trace, arrivals: Arrivals) -> list[Instance]:
    shares = trace.blocks is not None and config.enable_prefix_caching == "on"
    names = TraceNames(trace.blocks, config.page_size) if shares and trace.blocks is not None else None
    adapters = arrivals.adapter_names, arrivals.adapter_bytes
    return [Instance(config, *adapters, names) for _ in range(config.num_instances)]


def make_routers(config: SimConfig, arrivals: Arrivals, instance_ids: Sequence[str]) -> list[Dispatcher]:
    """Each counts what it sent itself; row i of its fleet is instance i."""
    everything = frozenset(arrivals.adapter_names)
    servers = [
        InstanceSnapshot(
            instance_id=instance_id,
            perf_model=config.perf_model,
            kv_tokens_total=config.num_pages * config.page_size,
            max_num_seqs=config.max_num_seqs,
            adapter_bytes_total=math.inf if config.mode == "cached" else config.device_pool_bytes,
            on_device=everything if config.mode == "cached" else frozenset(),
            on_host=frozenset() if config.host_store_bytes else everything,
        )
        for instance_id in instance_ids
    ]
    objectives = config.slo_tpt_ms, config.slo_ttft_ms
    return [
        Dispatcher(
            make_policy(
                config.policy,
                PolicySettings(
                    objectives[0], config.seed + index * SEED_STRIDE, config.candidates, objectives[1]
                ),
            ),
            servers,
            response_tokens=config.response_tokens,
            snapshot_interval=round(config.snapshot_interval_s * NS_PER_S),
            placement=make_placement(
                config.placement, PlacementSettings(config.num_copies, config.slo_tpt_ms)
            ),
            ticks_per_s=NS_PER_S,
        )
        for index in range(config.num_routers)
    ]
