"""Which of a CPU's instructions everyone may use: all, or no more than AVX2 has, on a CPU that has more."""

import os

NATIVE, AVX2 = "native", "avx2"
VARIABLE = "PEERS_ISA"
"""Tells a side what it is held to."""

ENVIRONMENTS: dict[str, dict[str, str]] = {
    NATIVE: {},
    AVX2: {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",  # on AMD's CPUs its fp32 products use no more in any case
        "NUMBA_CPU_NAME": "x86-64-v3",
        "NUMBA_CPU_FEATURES": "",
    },
}
BEYOND_AVX2 = (
    *("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_vnni_supported", "_is_avx512_vnni_supported"),
    *("_is_amx_tile_supported", "_is_amx_fp16_supported"),
)


def environment(isa: str) -> dict[str, str]:
    """Of a side's process. What would hold it to other instructions, set outside, goes."""
    outside = {name: value for name, value in os.environ.items() if name not in ENVIRONMENTS[AVX2]}
    return {**outside, **ENVIRONMENTS[isa], VARIABLE: isa}


def hold_torch() -> None:
    """torch and what asks it (vLLM for its kernels, the compiler of graphs) see no more than they may. torch
    reads these from the CPU whatever its own variable says."""
    if os.environ.get(VARIABLE) == AVX2:
        import torch

        for name in BEYOND_AVX2:
            if hasattr(torch.cpu, name):
                setattr(torch.cpu, name, lambda: False)
