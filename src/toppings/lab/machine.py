"""The machine: what stands beside a result, how much memory is left, files that are to be read anew."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = ("toppings", "torch", "triton", "numpy", "numba", "transformers", "peft")
SHOWN_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def describe_machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, GPUs, load, versions; what is not known is None."""
    cpu = _cpu_info()
    flags = set(cpu.get("flags", "").split())
    return {
        "platform": platform.platform(),
        "cpu": cpu.get("model name") or platform.processor() or None,
        "cpu_features": [flag for flag in SHOWN_FLAGS if flag in flags],
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def available_memory_bytes() -> int:
    """What new processes can take without swapping, as the kernel estimates it; 0 where it does not."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def drop_page_cache(directory: Path) -> None:
    """Asks the kernel to forget the files below `directory`: the next read of them comes from the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cpu_info() -> dict[str, str]:
    """Of the first core that the kernel lists; empty where there is no such list."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    fields = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in fields}


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
