"""Prometheus metrics: what the server has measured itself, and the engine's latest snapshot."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from toppings.core import FinishReason
from toppings.dashboard.recent import Recent
from toppings.detokenizer import TextOutput
from toppings.exchanges.counts import ExchangeCounts, LogsCollector
from toppings.exchanges.exchange import Exchange
from toppings.messages import AdapterStatus, ColdStart, EngineStats

LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
VLLM_COUNTERS = {
    "preemptions": ("num_preemptions", "Preemptions by recomputation."),
    "prefix_cache_queries": ("prefix_cache_queries", "Tokens of started prompts."),
    "prefix_cache_hits": ("prefix_cache_hits", "Tokens of started prompts that were in the cache."),
    "spec_decode_drafts": ("spec_decode_num_drafts", "Drafts of tokens that were computed."),
    "spec_decode_draft_tokens": ("spec_decode_num_draft_tokens", "Tokens of drafts."),
    "spec_decode_accepted_tokens": ("spec_decode_num_accepted_tokens", "Those that the model drew itself."),
}
"""The engine's counters by their names here, with those that vLLM gives them."""
STEP_LOG, STEP_LOG_DROPPED = "steps.jsonl", "step_log_dropped"
COLD_START_PARTS = ("read", "copy", "exposed", "compute")


@dataclass(slots=True)
class RequestTimer:
    """Instants of one sequence (`time.perf_counter`), from the request's arrival to its last token."""

    started_at: float
    num_prompt_tokens: int
    has_adapter: bool
    first_at: float | None = None
    num_tokens: int = 0
    outcome: str = "abort"
    queue_ms: float | None = None
    cold_start: ColdStart | None = None
    num_cached_tokens: int = 0
    ended_at: float = field(default=0.0)

    def note(self, output: TextOutput) -> None:
        if self.first_at is None and (output.token_ids or output.finish_reason is not None):
            self.first_at = time.perf_counter()
            self.queue_ms, self.cold_start = output.queue_ms, output.cold_start
            self.num_cached_tokens = output.num_cached_tokens or 0
        self.num_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self.outcome = str(output.finish_reason)

    @property
    def start(self) -> str:
        """How the request found its adapter: none asked for, on the device, or not."""
        if not self.has_adapter:
            return "base"
        return "warm" if self.cold_start is None else "cold"


class Metrics:
    """The server's own histograms and counters; no label takes values that a client chooses."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        model, registry, buckets = {"model_name": model_name}, self.registry, LATENCY_BUCKETS_S

        def histogram(name: str, help_text: str, *labels: str) -> Histogram:
            return Histogram(name, help_text, labels, buckets=buckets, registry=registry)

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(name, help_text, labels, registry=registry)

        names = ("model_name",)
        self._vllm_ttft = histogram("vllm:time_to_first_token_seconds", "Time to first token.", *names)
        self._vllm_e2e = histogram("vllm:e2e_request_latency_seconds", "End-to-end latency.", *names)
        self._vllm_queue = histogram("vllm:request_queue_time_seconds", "Arrival to first scheduled.", *names)
        self._vllm_decode = histogram("vllm:request_decode_time_seconds", "First token to last.", *names)
        self._vllm_success = counter(
            "vllm:request_success", "Sequences that ended well, by how.", *names, "finished_reason"
        )
        self._ttft = histogram(
            "toppings:ttft_seconds", "Time to first token, by how the adapter was found.", "start"
        )
        self._tpt = histogram("toppings:tpt_seconds", "End-to-end latency over generated tokens.", "start")
        self._e2e = histogram("toppings:e2e_seconds", "End-to-end latency.", "start")
        self._queue = histogram("toppings:queue_seconds", "Arrival to first scheduled.")
        self._cold = histogram("toppings:cold_start_seconds", "Parts of cold starts.", "part", "tier")
        self._requests = counter("toppings:requests", "Sequences that ended, by how.", "outcome")
        self._exchanges = ExchangeCounts(registry, "toppings:", ("queue", "tenant"))
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of started sequences.", *names)
        self._generated_tokens = counter("vllm:generation_tokens", "Generated tokens.", *names)
        self._model = model
        self.logs: dict[str, Callable[[], int]] = {}
        """Files of records, and "traces", and how many each has dropped; the engine tells of its own."""
        self.recent = Recent()
        for outcome in ("stop", "length", "abort", "error", "rejected"):
            self._requests.labels(outcome)
        for reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._vllm_success.labels(model_name, reason)
        for times in (self._vllm_ttft, self._vllm_e2e, self._vllm_queue, self._vllm_decode):
            times.labels(**model)
        for tokens in (self._prompt_tokens, self._generated_tokens):
            tokens.labels(**model)

    def note_exchange(self, exchange: Exchange) -> None:
        """One that is over: who was told no, and what tenants had."""
        self._exchanges.note(exchange)
        if exchange.rejected_by:
            self._requests.labels("rejected").inc()
            self.recent.note_end("rejected")

    def note(self, timer: RequestTimer, output: TextOutput) -> None:
        """An output of a sequence, as it comes."""
        was_begun = timer.first_at is not None
        timer.note(output)
        self.recent.note_tokens(len(output.token_ids))
        if not was_begun and timer.first_at is not None:
            self.recent.note_prompt(timer.num_prompt_tokens)
            if output.token_ids:
                self.recent.note_ttft(timer.first_at - timer.started_at)

    def observe(self, timer: RequestTimer) -> None:
        """Count a sequence that has ended; only finished ones enter the latencies."""
        self._requests.labels(timer.outcome).inc()
        self.recent.note_end(timer.outcome)
        self._generated_tokens.labels(**self._model).inc(timer.num_tokens)
        if timer.first_at is None:
            return
        self._prompt_tokens.labels(**self._model).inc(timer.num_prompt_tokens)
        ttft = timer.first_at - timer.started_at
        if timer.num_tokens:
            self._vllm_ttft.labels(**self._model).observe(ttft)
            self._ttft.labels(timer.start).observe(ttft)
        if timer.queue_ms is not None:
            self._queue.observe(timer.queue_ms / 1e3)
            self._vllm_queue.labels(**self._model).observe(timer.queue_ms / 1e3)
        if timer.cold_start is not None:
            self._observe_cold(timer.cold_start)
        if timer.outcome in (FinishReason.STOP, FinishReason.LENGTH):
            e2e = timer.ended_at - timer.started_at
            self._vllm_e2e.labels(**self._model).observe(e2e)
            self._vllm_decode.labels(**self._model).observe(timer.ended_at - timer.first_at)
            self._vllm_success.labels(finished_reason=timer.outcome, **self._model).inc()
            self._e2e.labels(timer.start).observe(e2e)
            if timer.num_tokens:
                self._tpt.labels(timer.start).observe(e2e / timer.num_tokens)
                self.recent.note_tpt(e2e / timer.num_tokens)

    def _observe_cold(self, cold: ColdStart) -> None:
        for part in COLD_START_PARTS:
            milliseconds: float = getattr(cold, f"{part}_ms")
            self._cold.labels(part, cold.tier).observe(milliseconds / 1e3)

    async def render(
        self, stats: EngineStats | None, name_of: Callable[[int], str], num_registered: int
    ) -> bytes:
        """The exposition text; without `stats` (no engine) only what the server itself counted. Made beside
        the event loop: it takes milliseconds."""
        dropped = dict(self.logs)
        snapshot = CollectorRegistry(auto_describe=False)
        if stats is not None:
            snapshot.register(EngineCollector(stats, name_of, num_registered))
            num_steps = int(stats.counters.get(STEP_LOG_DROPPED, 0))
            dropped[STEP_LOG] = lambda: num_steps
        snapshot.register(LogsCollector("toppings:log_dropped", dropped))
        return await asyncio.to_thread(lambda: generate_latest(self.registry) + generate_latest(snapshot))


class EngineCollector(Collector):
    """One engine snapshot as metric families; built for each scrape: no series outlives what it tells of."""

    def __init__(self, stats: EngineStats, name_of: Callable[[int], str], num_registered: int) -> None:
        self._stats = stats
        self._lora_names = [",".join(map(name_of, ids)) for ids in lora_lists(stats)]  # in the loop's thread
        self._num_registered = num_registered

    def describe(self) -> Iterator[Metric]:
        """Nothing: a registry would collect all to learn the names, and there is nobody else in it."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        usage = stats.kv_pages_used / stats.kv_pages_total if stats.kv_pages_total else 0.0
        yield _gauge("vllm:num_requests_running", "Requests in the running batch.", stats.num_running)
        yield _gauge("vllm:num_requests_waiting", "Requests in the queue.", stats.num_waiting)
        yield _gauge("vllm:kv_cache_usage_perc", "Share of the key-value cache in use, 0 to 1.", usage)
        yield self._cache_config()
        yield self._lora_info()
        yield from self._memory()
        yield from _merged(stats)
        for name, value in sorted(stats.counters.items()):
            if name == STEP_LOG_DROPPED:  # told with the other logs
                continue
            yield CounterMetricFamily(f"toppings:{name}", f"The engine's count of {name}.", value=value)
        for name, (told, help_text) in VLLM_COUNTERS.items():
            yield CounterMetricFamily(f"vllm:{told}", help_text, value=stats.counters.get(name, 0))

    def _cache_config(self) -> Metric:
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "Shape of the key-value cache.", labels=["block_size", "num_gpu_blocks"]
        )
        family.add_metric([str(self._stats.page_size), str(self._stats.kv_pages_total)], 1)
        return family

    def _lora_info(self) -> Metric:
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters ready and waited for.", labels=labels)
        family.add_metric([str(num_slots(self._stats)), *self._lora_names], time.time())
        return family

    def _memory(self) -> Iterator[Metric]:
        stats = self._stats
        used = GaugeMetricFamily(
            "toppings:adapter_bytes_used", "Bytes of adapters, by tier.", labels=["tier"]
        )
        total = GaugeMetricFamily(
            "toppings:adapter_bytes_capacity", "Room for adapters, by tier.", labels=["tier"]
        )
        count = GaugeMetricFamily("toppings:adapters", "Adapters, by where they are.", labels=["tier"])
        used.add_metric(["host"], stats.host_bytes_used)
        used.add_metric(["device"], stats.device_bytes_used)
        total.add_metric(["host"], stats.host_bytes_total)
        total.add_metric(["device"], stats.device_bytes_total)
        count.add_metric(["registered"], self._num_registered)
        count.add_metric(["host"], sum(a.is_on_host for a in stats.adapters))
        count.add_metric(["device"], sum(is_resident(a) for a in stats.adapters))
        yield from (used, total, count)


def is_resident(adapter: AdapterStatus) -> bool:
    return adapter.device_layers == adapter.num_layers > 0


def num_slots(stats: EngineStats) -> int:
    """`max_lora`: how many adapters the device pool would hold at the mean size of those it holds now.

    The pool is ragged, so there is no fixed number; one that holds nothing yet is told to have room for one.
    """
    num_held = sum(a.device_layers > 0 for a in stats.adapters)
    if not num_held or not stats.device_bytes_used:
        return max(1, num_held)
    return max(num_held, int(stats.device_bytes_total / (stats.device_bytes_used / num_held)))


def lora_lists(stats: EngineStats) -> tuple[list[int], list[int]]:
    """Adapter ids for `running_lora_adapters` and `waiting_lora_adapters`; no id is in both.

    Running: adapters in use, and idle ones that are ready on the device while the pool has room for another.
    In a full pool, idle adapters that may be evicted are left out, so that a router sees the room they leave.
    Waiting: adapters with waiting requests that are not running.
    """
    num_held = sum(a.device_layers > 0 for a in stats.adapters)
    is_full = num_held >= num_slots(stats)
    running = [
        a.adapter_id
        for a in stats.adapters
        if a.num_running or (is_resident(a) and (a.is_pinned or a.num_waiting or not is_full))
    ]
    are_running = set(running)
    waiting = [a.adapter_id for a in stats.adapters if a.num_waiting and a.adapter_id not in are_running]
    return running, waiting


def _merged(stats: EngineStats) -> Iterator[Metric]:
    """Nothing where merged mode is off."""
    if (merged := stats.merged) is not None:
        share = merged.num_folded / merged.num_groups if merged.num_groups else 0.0
        yield _gauge("toppings:merged_folded", "Of an adapter in the base model's weights, 0 to 1.", share)
        yield _gauge("toppings:merged_kept_bytes", "Host memory of weights as they were.", merged.kept_bytes)
        yield _gauge("toppings:merged_gain", "Of the steps' time, that folding saves.", merged.gain)


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help_text, value=value)
