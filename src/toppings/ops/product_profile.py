"""What products with a model's weights take on this CPU, form by form, and which form serves therefore.

Measured with the products that serve (`linear.Linear`), on random weights of the model's shapes, where rows
are few on so many that they lie beyond the caches, in huge pages as a model's are. The limits that times are
held against are measured beside them: the weight's bytes over the bandwidth of reading such pages, operations
over the rate of the library's float32 product.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from toppings.ops import dispatch
from toppings.ops.huge_pages import use_huge_pages
from toppings.ops.linear import Linear, packed_reason
from toppings.ops.products import MANY_ROWS, Forms, is_native, rule_for

ROWS = (1, 4, 8, 16, 32, MANY_ROWS)
_MAX_WEIGHT = 2**22
"""Elements of a measured weight: of a wider one, the first columns."""
_READ_BYTES = 64 * 2**20
"""Of weights that a product of few rows goes through; with more rows, two weights are enough."""
_READING_ROWS = 8
_READ_ELEMENTS = 2**25
_SGEMM = (512, 1024, 1024)
_REPEATS = 3
_HOPELESS = 4.0
"""A form that is so much slower than the best is not tried with more rows (panels gain with them)."""
_MAX_WAITED = 0.1
_BUDGET_S = 1.5
"""After this nothing is timed more than once."""
_MARGIN = 1.25
"""So much faster is another way to keep weights than the expected one, before it takes its place."""


@dataclass(frozen=True)
class ProductTime:
    """Of one product of [num_rows, num_in] with a weight [num_out, num_in]."""

    num_in: int
    num_out: int
    num_rows: int
    form: str
    ms: float


@dataclass(frozen=True)
class ProductProfile:
    """`cpu`: what the times hold for, `this_cpu()`; `read_gbps` in 10^9 bytes, `sgemm_gflops` in 10^9
    operations a second, on `num_threads` threads; `waited`: the share of the time in which other work had the
    core."""

    cpu: str
    num_threads: int
    dtype: str
    read_gbps: float
    sgemm_gflops: float
    waited: float
    times: tuple[ProductTime, ...]

    @property
    def is_disturbed(self) -> bool:
        """The times say more about other work than about the products."""
        return self.waited > _MAX_WAITED

    def forms(self) -> dict[int, Forms]:
        """The choice, by input width."""
        return {num_in: self._choose(num_in) for num_in in sorted({t.num_in for t in self.times})}

    def _choose(self, num_in: int) -> Forms:
        """The expected way of keeping weights (`rule_for`) stays unless the other is faster by a margin, over
        all numbers of rows: a measurement beside other work is not exact."""
        expected = rule_for(getattr(torch, self.dtype))
        times = {(t.form, t.num_rows): t.ms for t in self.times if t.num_in == num_in}
        stream_rows, cost, least = 0, 0.0, 0.0  # costs over those of panels throughout
        for rows in sorted({rows for form, rows in times if form == "stream" and ("panels", rows) in times}):
            cost += math.log(times["stream", rows] / times["panels", rows])
            if cost < least:
                stream_rows, least = rows, cost
        counts = [rows for rows in ROWS if ("packed", rows) in times]
        ratios = []
        for rows in counts:
            others = [times[form, rows] for form in ("stream", "panels") if (form, rows) in times]
            if others:
                ratios.append(math.log(times["packed", rows] / min(others)))
        advantage = math.exp(sum(ratios) / len(ratios)) if ratios else (0.0 if counts else math.inf)
        is_packed = advantage < (_MARGIN if expected.is_packed else 1 / _MARGIN)
        return Forms(is_packed=is_packed, max_stream_rows=stream_rows)

    def limit_ms(self, t: ProductTime) -> tuple[float, str]:
        """The time that a product cannot fall below here, and what sets it."""
        itemsize = getattr(torch, self.dtype).itemsize
        read_ms = t.num_in * t.num_out * itemsize / self.read_gbps / 1e6
        sgemm_ms = 2 * t.num_rows * t.num_in * t.num_out / self.sgemm_gflops / 1e6
        return (read_ms, "read") if read_ms >= sgemm_ms else (sgemm_ms, "sgemm")

    def table(self) -> list[str]:
        """Lines: which form serves which width and number of rows, and at what share of the limit."""
        lines = [
            f"products in {self.dtype} on {self.num_threads} threads of {self.cpu}: "
            f"read {self.read_gbps:.1f} GB/s, sgemm {self.sgemm_gflops:.0f} GFLOP/s",
            f"{'in':>6} {'rows':>5} {'form':>7} {'ms':>8} {'of limit':>9}",
        ]
        for num_in, forms in self.forms().items():
            for t in self.times:
                if t.num_in == num_in and t.form == forms.name(t.num_rows):
                    limit, by = self.limit_ms(t)
                    share = f"{limit / t.ms:.0%} {by}"
                    lines.append(f"{num_in:>6} {t.num_rows:>5} {t.form:>7} {t.ms:>8.3f} {share:>9}")
        return lines

    def holds_here(self, dtype: torch.dtype, widths: Mapping[int, int]) -> bool:
        """Measured on this CPU, with as many threads, for these widths (`measure`)."""
        return (
            self.cpu == this_cpu()
            and self.num_threads == torch.get_num_threads()
            and self.dtype == _name(dtype)
            and {t.num_in for t in self.times} == set(widths)
        )

    @classmethod
    def read(cls, path: Path) -> "ProductProfile | None":
        """None for a file that is not there or holds none: it is measured again then."""
        try:
            fields = json.loads(path.read_text())
            return cls(**{**fields, "times": tuple(ProductTime(**each) for each in fields["times"])})
        except (OSError, KeyError, TypeError, ValueError):
            return None

    def write(self, path: Path) -> None:
        """Whoever reads meanwhile finds the old file or the new one, whole. Raises OSError."""
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(asdict(self), indent=1))
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise


def this_cpu() -> str:
    """The processor's name, what torch uses of it, and torch's version, whose products the times are of."""
    name = "unknown CPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    natives = [_name(each) for each in (torch.bfloat16, torch.float16) if is_native(each)]
    extra = "".join(f", {each} products" for each in natives)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}{extra}; torch {torch.__version__})"


def measure(dtype: torch.dtype, widths: Mapping[int, int]) -> ProductProfile:
    """`widths`: by each input width of the model's weights, the widest output. Takes a second or two; has no
    times where it is disturbed from the start."""
    times: list[ProductTime] = []
    watch = _Watch()
    read_gbps, sgemm_gflops = _read_gbps(watch), _sgemm_gflops(watch)
    for num_in, num_out in widths.items() if watch.waited <= _MAX_WAITED else ():
        times += _times(watch, dtype, num_in, max(1, min(num_out, _MAX_WEIGHT // num_in)))
    here = (this_cpu(), torch.get_num_threads(), _name(dtype))
    return ProductProfile(*here, read_gbps, sgemm_gflops, watch.waited, tuple(times))


def _times(watch: "_Watch", dtype: torch.dtype, num_in: int, num_out: int) -> list[ProductTime]:
    num_weights = -(-_READ_BYTES // (num_in * num_out * dtype.itemsize))
    weight = torch.randn(num_out, num_in).to(dtype)
    weights = [weight.clone() for _ in range(num_weights)]
    candidates = {"panels": Forms(is_packed=False), "packed": Forms(is_packed=True)}
    if dispatch.kernels("stream", weight) is not None:
        candidates["stream"] = Forms(is_packed=False, max_stream_rows=MANY_ROWS - 1)
    if not packed_reason(dtype)[0]:
        del candidates["packed"]
    best: dict[int, float] = {}
    times = []
    for name, forms in sorted(candidates.items(), reverse=True):  # the packed ones last: they may be hopeless
        products = [Linear(each, forms=forms) for each in weights]
        use_huge_pages(span for each in products for span in each.spans())  # as those of a model
        for rows in ROWS:
            if forms.name(rows) != name:
                break
            x = torch.randn(rows, num_in).to(dtype)
            used = products if rows <= _READING_ROWS else products[:2]
            ms = watch.best_s(lambda used=used, x=x: [each(x) for each in used]) / len(used) * 1e3  # type: ignore[misc]
            times.append(ProductTime(num_in, num_out, rows, name, ms))
            best[rows] = min(ms, best.get(rows, math.inf))
            if name != "panels" and ms > _HOPELESS * best[rows]:
                break
        del products
    return times


def _read_gbps(watch: "_Watch") -> float:
    data = torch.ones(_READ_ELEMENTS)
    use_huge_pages([(data.data_ptr(), data.data_ptr() + data.nbytes)])
    return data.nbytes / watch.best_s(data.sum) / 1e9


def _sgemm_gflops(watch: "_Watch") -> float:
    m, n, k = _SGEMM
    a, b = torch.randn(m, k), torch.randn(n, k)
    return 2 * m * n * k / watch.best_s(lambda: torch.mm(a, b.t())) / 1e9


class _Watch:
    """Times actions, and sees how long this thread waited for its core meanwhile."""

    def __init__(self) -> None:
        self._started_at, self._waited_s = time.perf_counter(), _waited_s()

    def best_s(self, action: Callable[[], list[Tensor] | Tensor]) -> float:
        """After one call that is not counted: the fastest is the one least disturbed."""
        action()
        times: list[float] = []
        while not times or (len(times) < _REPEATS and self._elapsed_s < _BUDGET_S):
            started_at = time.perf_counter()
            action()
            times.append(time.perf_counter() - started_at)
        return min(times)

    @property
    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._started_at

    @property
    def waited(self) -> float:
        """Share of the time since it was made."""
        return (_waited_s() - self._waited_s) / self._elapsed_s


def _waited_s() -> float:
    """Seconds that this thread has been ready to run and did not; 0 where the kernel does not tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
