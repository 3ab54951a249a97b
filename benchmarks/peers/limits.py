"""What this machine can do, as a side: each answer is a fresh measurement, in the turns of the others."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from peers.side import Side

READ_BYTES = 512 * 2**20
PRODUCT = (512, 1024, 2816)  # rows, in, out
REPEATS = 5


def best_s(action: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(REPEATS):
        started_at = time.perf_counter()
        action()
        times.append(time.perf_counter() - started_at)
    return min(times)


def read_gbps() -> float:
    """Read bandwidth in 10^9 bytes a second: sums over memory larger than any cache."""
    return READ_BYTES / best_s(torch.ones(READ_BYTES // 4).sum) / 1e9


def product_gflops(dtype: torch.dtype) -> float:
    """10^9 operations a second of the library's product in this type."""
    m, k, n = PRODUCT
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    return 2 * m * k * n / best_s(lambda: torch.mm(x, weight.t())) / 1e9


def measure() -> dict[str, float]:
    return {
        "read_gbps": read_gbps(),
        "sgemm_gflops": product_gflops(torch.float32),
        "bf16_gflops": product_gflops(torch.bfloat16),
    }


def main() -> None:
    Side().serve_any(
        measure,
        threads=torch.get_num_threads(),
        capability=torch.backends.cpu.get_cpu_capability(),
        multiplies_bf16=bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    )


if __name__ == "__main__":
    main()
