"""Which form of an operation runs: the numba kernels for tensors in host memory, the Triton kernels for those
on a CUDA device, torch for everything else."""

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HAS_NUMBA = importlib.util.find_spec("numba") is not None
"""The kernels can be compiled here."""

USE_NUMBA = HAS_NUMBA
"""The kernels are used for tensors in host memory."""

NUMBA_REASON = "numba is installed" if HAS_NUMBA else "numba is not installed: torch operators serve instead"

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Triton can be imported here."""

TRITON_DEVICES: tuple[str, ...] = ("cuda",) if HAS_TRITON else ()
"""Types of devices whose tensors the Triton kernels serve (with its interpreter also "cpu")."""

TRITON_REASON = (
    "triton is installed" if HAS_TRITON else "triton is not installed: torch operators serve instead"
)

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernels(name: str, sample: Tensor) -> ModuleType | None:
    """The kernel module `toppings.ops.cpu_<name>` where it can serve tensors like `sample`, else None."""
    if not USE_NUMBA or sample.device.type != "cpu" or sample.dtype not in KERNEL_DTYPES:
        return None
    return _module(name)


def bf16_kernels(sample: Tensor, name: str = "bf16") -> ModuleType | None:
    """The module `toppings.ops.cpu_<name>`, one of those for CPUs that multiply bfloat16, where it can serve
    tensors like `sample`, else None."""
    if sample.dtype != torch.bfloat16 or sample.device.type != "cpu" or not USE_NUMBA or not has_bf16():
        return None
    return _module(name)


@cache
def has_bf16() -> bool:
    """This CPU multiplies bfloat16 by an instruction that the kernels can use."""
    return HAS_NUMBA and bool(_module("tiles").is_supported())


@cache
def has_byte_tables() -> bool:
    """The kernels for codes of 8 bits and bfloat16 can be compiled for this CPU."""
    return has_bf16() and bool(_module("tiles").has_byte_tables())


@cache
def has_matrix_unit() -> bool:
    """Products of many bfloat16 rows are better left to torch."""
    return has_bf16() and bool(_module("tiles").has_matrix_unit())


def gpu_kernels(name: str, sample: Tensor) -> Any:
    """The module `toppings.ops.gpu_<name>` where it can serve tensors like `sample`, else None."""
    if sample.device.type not in TRITON_DEVICES or sample.dtype not in KERNEL_DTYPES:
        return None
    return importlib.import_module(f"toppings.ops.gpu_{name}")


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"toppings.ops.cpu_{name}")


def import_kernels() -> None:
    """Import what `warm_up` will need, without running any of it."""
    if USE_NUMBA:
        for name in (
            "attention",
            "bf16",
            "bf16_quantized",
            "columns",
            "elementwise",
            "experts",
            "lora",
            "quantized",
            "recording",
            "stream",
            "tiles",
            "warm_up",
        ):
            _module(name)


def warm_up(dtype: torch.dtype, quantized: Sequence[Any] = ()) -> None:
    """Compile (or read from numba's cache) every CPU kernel for `dtype`, and those of the products
    `quantized` (`linear.QuantizedLinear`); without numba there is nothing to do."""
    if USE_NUMBA:
        _module("warm_up").warm_up(dtype, quantized)
