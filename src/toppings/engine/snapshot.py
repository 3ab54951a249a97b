"""What an engine tells of itself: queue, cache, memory, adapters."""

from collections import Counter
from collections.abc import Mapping

from toppings.adapters.manager import AdapterManager
from toppings.core import Request
from toppings.engine.scheduler import Scheduler
from toppings.messages import EngineStats, MergedStatus


def snapshot(
    call_id: int,
    scheduler: Scheduler,
    adapters: AdapterManager,
    counters: Mapping[str, float],
    *,
    only_changes: bool,
    num_workers: int = 0,
    merged: MergedStatus | None = None,
) -> EngineStats:
    """`only_changes`: of adapters that have changed since the last such snapshot. What it costs grows with
    the number of requests and of such adapters, not with the number that is resident."""

    def rank(request: Request) -> int:
        return 0 if request.adapter_id is None else adapters.step_rank_of(request.adapter_id)

    pages, cache, pool, host = scheduler.pages, scheduler.cache, adapters.pool, adapters.host
    running, waiting = list(scheduler.running), list(scheduler.waiting)
    num_waiting = Counter(r.adapter_id for r in waiting if r.adapter_id is not None)
    return EngineStats(
        call_id=call_id,
        num_running=len(running),
        num_waiting=len(waiting),
        kv_pages_used=pages.num_used,
        kv_pages_total=pages.num_pages,
        page_size=pages.page_size,
        host_bytes_used=host.used_bytes,
        host_bytes_total=host.capacity_bytes,
        device_bytes_used=pool.used_bytes,
        device_bytes_total=pool.capacity_bytes,
        adapters=adapters.changes(num_waiting) if only_changes else adapters.status(num_waiting),
        running_ranks=[rank(r) for r in running],
        waiting_ranks=[rank(r) for r in waiting],
        waiting_tokens=sum(r.num_uncomputed_tokens for r in waiting),
        context_tokens=sum(r.num_computed_tokens for r in running),
        counters={
            **counters,
            **adapters.counters(),
            "preemptions": scheduler.num_preemptions,
            "drains": scheduler.draining.num_drains,
            "prefix_cache_queries": cache.num_queries,
            "prefix_cache_hits": cache.num_hits,
            "prefix_cache_waits": cache.num_waits,
            "prefix_cache_evictions": pages.num_evictions,
            **({} if scheduler.drafts is None else scheduler.drafts.counters()),
        },
        num_workers=num_workers,
        merged=merged,
    )
