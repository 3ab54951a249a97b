"""Numerics: each operation is a plain torch reference and, beside it, the form that is fast on a device.

Tensors only; nothing here knows about requests, checkpoints or adapters' names. The fast CPU forms are numba
kernels (`cpu_*.py`), compiled at first use or by `warm_up`, and kept in numba's cache on disk.
"""

from toppings.ops.dispatch import HAS_NUMBA, NUMBA_REASON, import_kernels, warm_up

__all__ = ["HAS_NUMBA", "NUMBA_REASON", "import_kernels", "warm_up"]
