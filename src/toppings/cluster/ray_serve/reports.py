"""What replicas tell, put together for the front's `/stats`, `/metrics` and `/replicas`."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from toppings.cluster.ray_serve.messages import ReplicaReport
from toppings.messages import AdapterStatus, EngineStats
from toppings.server.metrics import is_resident


def merge_stats(reports: Sequence[ReplicaReport], id_of: Callable[[str], int | None]) -> EngineStats:
    """All engines as one: sums, and each adapter where it is best off; unknown adapters are left out."""
    adapters: dict[int, AdapterStatus] = {}
    for name, status in (pair for report in reports for pair in report.adapters):
        adapter_id = id_of(name)
        if adapter_id is not None:
            own = replace(status, adapter_id=adapter_id)
            adapters[adapter_id] = _join(adapters[adapter_id], own) if adapter_id in adapters else own
    parts = [report.stats for report in reports]
    names = sorted({name for part in parts for name in part.counters})
    return EngineStats(
        call_id=0,
        num_running=sum(part.num_running for part in parts),
        num_waiting=sum(part.num_waiting for part in parts),
        kv_pages_used=sum(part.kv_pages_used for part in parts),
        kv_pages_total=sum(part.kv_pages_total for part in parts),
        page_size=max((part.page_size for part in parts), default=0),
        host_bytes_used=sum(part.host_bytes_used for part in parts),
        host_bytes_total=sum(part.host_bytes_total for part in parts),
        device_bytes_used=sum(part.device_bytes_used for part in parts),
        device_bytes_total=sum(part.device_bytes_total for part in parts),
        adapters=list(adapters.values()),
        running_ranks=[rank for part in parts for rank in part.running_ranks],
        waiting_ranks=[rank for part in parts for rank in part.waiting_ranks],
        waiting_tokens=sum(part.waiting_tokens for part in parts),
        context_tokens=sum(part.context_tokens for part in parts),
        counters={name: sum(p.counters.get(name, 0) for p in parts) for name in names},
    )


def _join(a: AdapterStatus, b: AdapterStatus) -> AdapterStatus:
    return AdapterStatus(
        adapter_id=a.adapter_id,
        is_on_host=a.is_on_host or b.is_on_host,
        device_layers=max(a.device_layers, b.device_layers),
        num_layers=max(a.num_layers, b.num_layers),
        num_running=a.num_running + b.num_running,
        num_waiting=a.num_waiting + b.num_waiting,
        num_hits=a.num_hits + b.num_hits,
        is_pinned=a.is_pinned or b.is_pinned,
    )


def describe(report: ReplicaReport) -> dict[str, object]:
    """One replica's row of `/replicas`."""
    stats = report.stats
    return {
        "id": report.replica_id,
        "node": report.node_id,
        "num_running": stats.num_running,
        "num_waiting": stats.num_waiting,
        "ranks": sorted(stats.running_ranks + stats.waiting_ranks),
        "kv_pages_used": stats.kv_pages_used,
        "kv_pages_total": stats.kv_pages_total,
        "adapters_on_device": sorted(name for name, status in report.adapters if is_resident(status)),
        "adapters_on_host": sorted(name for name, status in report.adapters if status.is_on_host),
    }
