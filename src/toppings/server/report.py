"""What this server tells those who send it requests."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from toppings.cluster.report import LeftEntry, RequestEntry, ServerReport
from toppings.messages import EngineReady, EngineStats
from toppings.server.metrics import is_resident, num_slots


def make_report(
    stats: EngineStats,
    info: EngineReady,
    name_of: Callable[[int], str],
    perf_model: Any,
    requests: Sequence[RequestEntry] | None = None,
    left: Iterable[LeftEntry] = (),
) -> ServerReport:
    """One engine's state; `perf_model` is JSON or None, `requests` those whose ids the router knows."""
    return ServerReport(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        running_ranks=stats.running_ranks,
        waiting_ranks=stats.waiting_ranks,
        kv_tokens_total=float(stats.kv_pages_total * stats.page_size) or None,
        kv_tokens_used=float(stats.kv_pages_used * stats.page_size),
        max_num_seqs=info.max_num_seqs,
        max_adapters=num_slots(stats),
        adapter_bytes_total=float(stats.device_bytes_total) or None,
        on_device=frozenset(name_of(a.adapter_id) for a in stats.adapters if is_resident(a)),
        on_host=frozenset(name_of(a.adapter_id) for a in stats.adapters if a.is_on_host),
        requests=None if requests is None else list(requests),
        left=list(left),
        perf_model=perf_model,
    )
