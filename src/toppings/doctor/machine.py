"""The machine: packages, processor, memory, GPU, limits."""

import os
import platform
import re
import resource
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from toppings.config import Config
from toppings.control_groups import memory_available
from toppings.doctor.finding import Finding, gib, good, note, wrong

PACKAGES = ("toppings", "torch", "numba", "triton", "transformers", "safetensors", "fastapi")
EXTRAS = {
    "otel": ("opentelemetry.exporter.otlp", "traces for a collector (otlp_traces_endpoint)"),
    "ray": ("ray", "`toppings up`"),
    "remote": ("s3fs", "adapters from object stores"),
    "gguf": ("gguf", "models in GGUF files"),
}
MIN_FILES = 4096
"""Open files below which connections are few."""
PROCESS_BYTES = 2**30
"""What the processes take beside weights, adapters and cache."""
SPARE_SHM_BYTES = 2**30


def look(config: Config) -> Iterator[Finding]:
    yield _versions()
    yield _extras()
    yield from _processor(config)
    yield from _memory(config)
    yield from _gpu(config)
    yield from _limits(config)


def _versions() -> Finding:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return good("versions", f"Python {platform.python_version()}, {', '.join(found)}")


def _extras() -> Finding:
    missing = [f"{name}: {what}" for name, (module, what) in EXTRAS.items() if not _is_there(module)]
    if not missing:
        return good("extras", ", ".join(EXTRAS))
    return note("extras", f"not installed: {'; '.join(missing)}", "pip install 'toppings[NAME]' where needed")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent
        return False


def _processor(config: Config) -> Iterator[Finding]:
    import torch

    from toppings.ops import dispatch, products

    num_cores = len(os.sched_getaffinity(0))
    yield good("cores", f"{num_cores} for this process, of {os.cpu_count()}: {_model_of_processor()}")
    threads = config.engine.num_threads
    if threads > num_cores:
        advice = f"--num-threads {num_cores}, or 0 for all"
        yield wrong("threads", f"num_threads is {threads}, with {num_cores} cores", advice)
    if not dispatch.USE_NUMBA:
        yield note("kernels", dispatch.NUMBA_REASON, "pip install numba")
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        forms = products.rule_for(dtype)
        if products.is_native(dtype):
            unit = " with a matrix unit" if dtype == torch.bfloat16 and dispatch.has_matrix_unit() else ""
            yield good(f"products in {name}", f"by the processor's own instructions{unit}: {forms}")
        else:
            advice = "where memory allows, --dtype float32; --quantization int8 reads less"
            yield note(f"products in {name}", f"widened to float32, {forms}: no instructions for it", advice)


def _model_of_processor() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def _memory(config: Config) -> Iterator[Finding]:
    engine = config.engine
    parts = {"host_store_bytes": engine.host_store_bytes, "the processes": PROCESS_BYTES}
    if engine.device == "cpu":
        from toppings.engine.build import default_cache_bytes

        cache_bytes = engine.kv_cache_bytes or default_cache_bytes()
        parts |= {"device_pool_bytes": engine.device_pool_bytes, "kv_cache_bytes": cache_bytes}
        if (weights := _weights_bytes(config)) is not None:
            parts["the model's files"] = weights
    needed, free = sum(parts.values()), memory_available()
    told = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    text = f"{gib(free)} available; at most {gib(needed)} are taken: {told}"
    if needed <= free:
        yield good("memory", text)
    else:
        yield wrong("memory", text, "lower host_store_bytes, device_pool_bytes or kv_cache_bytes")


def _weights_bytes(config: Config) -> int | None:
    from toppings.engine.base import model_path

    try:
        files = model_path(config.engine).glob("*.safetensors")
        return sum(file.stat().st_size for file in files)
    except (ValueError, OSError):
        return None  # told where the model is looked at


def _gpu(config: Config) -> Iterator[Finding]:
    import torch

    wants = config.engine.device == "cuda"
    if not torch.cuda.is_available():
        reason = "torch finds none" if torch.version.cuda else "this build of torch has no CUDA"
        if wants:
            yield wrong(
                "GPU", f"device is cuda, but {reason}", "--device cpu, or a driver and torch for CUDA"
            )
        else:
            yield good("GPU", f"{reason}; the model runs on the CPU")
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    size = config.engine.tensor_parallel_size
    if wants and size > len(names):
        yield wrong("GPU", f"{len(names)}, but tensor_parallel_size is {size}", "lower it")
    elif not wants:
        yield note("GPU", f"{', '.join(names)}, not used", "--device cuda")
    else:
        free, total = torch.cuda.mem_get_info()
        yield good("GPU", f"{', '.join(names)}; {gib(free)} of {gib(total)} free on the first")
    if wants and not _is_there("cuda.bindings"):
        yield note("GPU", "cuda.bindings is missing: no CPU assistance", "pip install 'toppings[cuda]'")


def _limits(config: Config) -> Iterator[Finding]:
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < MIN_FILES:
        text = f"{files} may be open: few more clients at once than that"
        yield note("open files", text, "LimitNOFILE= of the unit, --ulimit nofile=65536 of the container")
    else:
        yield good("open files", "no limit" if files < 0 else f"{files} may be open")
    if config.engine.device == "cuda":
        _, locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if 0 <= locked < config.engine.host_store_bytes and os.geteuid():
            text = (
                f"{gib(locked)} may be page-locked, host_store_bytes is {gib(config.engine.host_store_bytes)}"
            )
            yield note("locked memory", text, "LimitMEMLOCK=infinity, or --ulimit memlock=-1")
    try:
        shm = shutil.disk_usage("/dev/shm").free
    except OSError:
        yield wrong("/dev/shm", "it is not there", "mount a tmpfs at /dev/shm")
        return
    if config.engine.tensor_parallel_size > 1 and shm < SPARE_SHM_BYTES:
        yield wrong("/dev/shm", f"{gib(shm)} free; a split model's parts talk there", "--shm-size 16G")
    else:
        yield good("/dev/shm", f"{gib(shm)} free")
