"""Where the Triton kernels are tested: on a GPU, or in Triton's interpreter on tensors in host memory.

The interpreter cuts fp32 to bfloat16 where a GPU rounds: exact equality is asked of the other dtypes only.
"""

import pytest
import torch

from tests.gate import NO_TRITON
from toppings.ops import dispatch

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

needs_triton = pytest.mark.skipif(not dispatch.HAS_TRITON, reason=NO_TRITON)
