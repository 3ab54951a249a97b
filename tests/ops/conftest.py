from typing import cast

import pytest
import torch

from tests.ops.gpu_world import DEVICE
from toppings.ops import dispatch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return cast("torch.dtype", request.param)


@pytest.fixture(params=["kernel", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways an operation can run: with the numba kernels and without."""
    monkeypatch.setattr(dispatch, "USE_NUMBA", request.param == "kernel")
    return cast("str", request.param)


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations on `DEVICE` run as Triton kernels."""
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", (DEVICE.type,))
