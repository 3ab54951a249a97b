"""What servers tell of themselves: the `/stats` of a Toppings server, or Prometheus text as of vLLM."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from toppings.cluster.perf_model import PerfModel

MAX_RANK = 2**16
MAX_LINE_LEN = 2**18


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One reading. `ranks` counts the running and waiting requests of each rank; None where nobody tells."""

    num_requests: int
    ranks: Counter[int] | None = None
    kv_tokens_total: float = math.inf
    kv_tokens_used: float = 0.0
    max_num_seqs: float = math.inf
    max_adapters: float = math.inf
    on_device: frozenset[str] = frozenset()
    on_host: frozenset[str] = frozenset()
    adapters_in_use: frozenset[str] = frozenset()
    perf_model: PerfModel | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no server has."""
        if self.num_requests < 0 or not all(0 <= rank <= MAX_RANK for rank in self.ranks or ()):
            raise ValueError(f"it tells of {self.num_requests} requests with ranks {dict(self.ranks or {})}")
        for name in ("kv_tokens_total", "max_num_seqs", "max_adapters"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, not above 0")
        if not 0 <= self.kv_tokens_used < math.inf:
            raise ValueError(f"kv_tokens_used is {self.kv_tokens_used}")


class _Adapter(msgspec.Struct):
    adapter_id: int
    name: str | None = None
    is_on_host: bool = False
    device_layers: int = 0
    num_layers: int = 0
    num_running: int = 0
    num_waiting: int = 0


class _Stats(msgspec.Struct):
    num_running: int
    num_waiting: int
    running_ranks: list[int]
    waiting_ranks: list[int]
    kv_pages_used: int
    kv_pages_total: int
    page_size: int
    adapters: list[_Adapter]
    max_lora: int | None = None
    max_num_seqs: int | None = None
    perf_model: msgspec.Raw = msgspec.Raw(b"null")


def parse_toppings_stats(body: bytes) -> Report:
    """Raises ValueError where the body is not a Toppings server's."""
    stats = msgspec.json.decode(body, type=_Stats)
    held = [a for a in stats.adapters if a.device_layers and a.device_layers == a.num_layers]
    return Report(
        num_requests=stats.num_running + stats.num_waiting,
        ranks=Counter(stats.running_ranks + stats.waiting_ranks),
        kv_tokens_total=float(stats.kv_pages_total * stats.page_size) or math.inf,
        kv_tokens_used=float(stats.kv_pages_used * stats.page_size),
        max_num_seqs=stats.max_num_seqs or math.inf,
        max_adapters=stats.max_lora or math.inf,
        on_device=_names(held),
        on_host=_names([a for a in stats.adapters if a.is_on_host]),
        adapters_in_use=_names([a for a in stats.adapters if a.num_running or a.num_waiting]),
        perf_model=_read_model(bytes(stats.perf_model)),
    )


def _read_model(text: bytes) -> PerfModel | None:
    try:
        return None if text == b"null" else PerfModel.from_json(text)
    except ValueError:  # of another version than ours: the configured model serves
        return None


def _names(adapters: list[_Adapter]) -> frozenset[str]:
    return frozenset(a.name if a.name is not None else str(a.adapter_id) for a in adapters)


@dataclass(slots=True)
class _Series:
    """Samples of the wanted families: labels and value, in the order they came."""

    samples: dict[str, list[tuple[dict[str, str], float]]] = field(default_factory=dict)

    def total(self, *names: str) -> float:
        """The sum over the series of the first family that is there."""
        found = next((self.samples[name] for name in names if name in self.samples), [])
        return sum(value for _, value in found if math.isfinite(value))


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
_LINE = re.compile(r"([^\s{]+)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def parse_prometheus(text: str) -> Report | None:
    """None where none of the known gauges is there. Lines that are no samples are passed over."""
    series = _read_series(text)
    if not series.samples:
        return None
    running, waiting, max_adapters = _read_lora(series)
    cache = series.samples.get("cache", [({}, 1.0)])[0][0]
    size = cache.get("block_size") or cache.get("page_size")
    count = cache.get("num_gpu_blocks") or cache.get("num_pages")
    total = math.inf
    if size and count and _is_number(size) and _is_number(count):
        total = float(size) * float(count) or math.inf
    usage = series.samples.get("kv_usage", [])
    used = max((value for _, value in usage), default=0.0)
    return Report(
        num_requests=int(series.total("running") + series.total("waiting")),
        kv_tokens_total=total,
        kv_tokens_used=used * total if total < math.inf else 0.0,
        max_adapters=max_adapters,
        on_device=running,
        adapters_in_use=running | waiting,
    )


def _read_series(text: str) -> _Series:
    series = _Series()
    for line in text.splitlines():
        if len(line) > MAX_LINE_LEN or not line.startswith(("vllm:", "sglang:")):
            continue
        kind = _WANTED.get(line.partition("{")[0].partition(" ")[0])
        match = _LINE.match(line) if kind else None
        if kind and match and _is_number(match[3]):
            labels = dict(_LABEL.findall(match[2] or ""))
            series.samples.setdefault(kind, []).append((labels, float(match[3])))
    return series


def _read_lora(series: _Series) -> tuple[frozenset[str], frozenset[str], float]:
    """Running and waiting adapters and `max_lora`, of the series with the largest value: it is the newest."""
    if "lora" not in series.samples:
        return frozenset(), frozenset(), math.inf
    labels, _ = max(series.samples["lora"], key=lambda sample: sample[1])
    max_lora = labels.get("max_lora", "")
    return (
        _split(labels.get("running_lora_adapters", "")),
        _split(labels.get("waiting_lora_adapters", "")),
        float(max_lora) if max_lora.isdigit() and int(max_lora) else math.inf,
    )


def _split(names: str) -> frozenset[str]:
    return frozenset(name.strip() for name in names.split(",") if name.strip())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
