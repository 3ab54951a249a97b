"""What the launches of Triton kernels share."""

import os
from functools import cache
from typing import Any

import torch
import triton.language as tl

_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_ELEMENTS_PER_WARP = 512
MULTIPROCESSORS_WITHOUT_GPU = 1
"""So that in the interpreter a program has more than one tile to do."""


def next_power_of_2(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


def num_warps_for(block: int) -> int:
    """Warps for a program that holds `block` elements: 16 a thread, at most 8 warps."""
    return max(1, min(8, block // _ELEMENTS_PER_WARP))


@cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS_WITHOUT_GPU
    cuda: Any = torch.cuda
    return int(cuda.get_device_properties(device).multi_processor_count)


def dot_options(dtype: torch.dtype) -> dict[str, Any]:
    """Constants of kernels with `tl.dot`: fp32 operands are not cut to TF32, and Triton's interpreter, whose
    product does not know bfloat16, gets them as fp32."""
    is_wide = dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    return {
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "OPERAND": tl.float32 if is_wide else _TRITON_DTYPES[dtype],
    }
