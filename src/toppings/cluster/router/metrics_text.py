"""What servers of other makes tell: a `ServerReport` from their Prometheus text, as vLLM's and SGLang's."""

import math
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from toppings.cluster.report import ServerReport

MAX_LINE_LEN = 2**18
MAX_SAMPLES = 1000
"""Of the wanted series; a server has a dozen."""

_WANTED = {
    name: kind
    for kind, names in {
        "running": ("vllm:num_requests_running", "sglang:num_running_reqs"),
        "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
        "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"),
        "cache": ("vllm:cache_config_info", "sglang:cache_config_info"),
        "lora": ("vllm:lora_requests_info",),
    }.items()
    for name in names
}

Series = Mapping[str, list[Sample]]


def translate_metrics(text: str) -> ServerReport | None:
    """None where none of the known gauges is there. Lines that are no samples are passed over.

    Raises ValueError for numbers that no server has.
    """
    series = _read_series(text)
    if not series:
        return None
    kv_tokens = _kv_tokens(series)
    usage = max((sample.value for sample in series.get("kv_usage", ())), default=0.0)
    # Of the series with the largest value, its instant: it is the newest.
    lora = max(series.get("lora", ()), key=lambda sample: sample.value, default=None)
    labels = lora.labels if lora is not None else {}
    running, waiting = (_split(labels.get(f"{kind}_lora_adapters", "")) for kind in ("running", "waiting"))
    return ServerReport(
        num_running=_total(series, "running"),
        num_waiting=_total(series, "waiting"),
        running_ranks=None,
        waiting_ranks=None,
        kv_tokens_total=kv_tokens,
        kv_tokens_used=usage * kv_tokens if kv_tokens is not None else 0.0,
        max_adapters=_number(labels, "max_lora"),
        on_device=running,
        on_host=frozenset(),
        in_use=running | waiting,
    )


def _read_series(text: str) -> Series:
    """The wanted samples. Of thousands of lines only these are parsed, each by itself."""
    series: defaultdict[str, list[Sample]] = defaultdict(list)
    num_left = MAX_SAMPLES
    for line in text.splitlines():
        kind = _WANTED.get(line[:64].partition("{")[0].partition(" ")[0])
        if kind is None or len(line) > MAX_LINE_LEN or not num_left:
            continue
        num_left -= 1
        with suppress(ValueError):
            for family in text_string_to_metric_families(line):
                series[kind] += family.samples
    return series


def _total(series: Series, kind: str) -> int:
    return int(sum(sample.value for sample in series.get(kind, ()) if math.isfinite(sample.value)))


def _kv_tokens(series: Series) -> float | None:
    """Tokens that the cache holds; None where that is not told."""
    labels = next((sample.labels for sample in series.get("cache", ())), {})
    size = _number(labels, "block_size", "page_size")
    count = _number(labels, "num_gpu_blocks", "num_pages")
    return None if size is None or count is None else size * count


def _number(labels: Mapping[str, str], *names: str) -> float | None:
    """The first of these labels that is there, where it is a finite number above 0."""
    with suppress(ValueError):
        value = float(next((labels[name] for name in names if labels.get(name)), ""))
        return value if 0 < value < math.inf else None
    return None


def _split(names: str) -> frozenset[str]:
    return frozenset(name.strip() for name in names.split(",") if name.strip())
