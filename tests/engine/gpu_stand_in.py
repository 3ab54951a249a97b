"""A GPU engine's parts without a GPU: its loader, staging, sampler and graphs, in an engine on the host.

Streams and events are those of tests/streams.py, graphs run again what was captured, and torch computes what
the kernels of attention and LoRA would, from the tensors that these read (tile_kernels.py).
"""

import random
from typing import Any

import pytest
import torch

from tests.engine import tile_kernels
from tests.streams import Device
from toppings.adapters import manager
from toppings.adapters.cuda_loader import CudaLoader
from toppings.engine import build
from toppings.engine.drawing import DeviceSampler
from toppings.engine.model_runner import ModelRunner
from toppings.engine.staging import Staging
from toppings.engine.step_inputs import InputBuilder
from toppings.ops import attention, dispatch, lora

_KERNELS = {"attention": tile_kernels, "lora": tile_kernels}


class UnsteadyDevice(Device):
    """What was queued is now over when it is asked for, now not yet."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        super().__init__()

    @property
    def is_idle(self) -> bool:
        return self._rng.random() < 0.3

    @is_idle.setter
    def is_idle(self, value: bool) -> None:
        """It never settles."""


def stand_in(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """Engines that are built from now on have a GPU's parts, over `device`, and run ahead."""
    staging = Staging(torch.device("cpu"), device)

    def make_runner(*arguments: Any) -> ModelRunner:
        config, decoder, cache, adapters, mode, _, form = arguments
        return ModelRunner(
            decoder,
            cache,
            adapters,
            mode,
            inputs=InputBuilder(config.page_size, staging),
            sample=DeviceSampler(staging, device),
            runs_ahead=True,
            decode_form=form,
        )

    monkeypatch.setattr(manager, "make_loader", lambda pool, *_: CudaLoader(pool.arena, cuda=device))
    monkeypatch.setattr(build, "make_staging", lambda *_, **__: staging)
    monkeypatch.setattr(build, "make_runner", make_runner)
    for module in (dispatch, attention, lora):
        monkeypatch.setattr(module, "gpu_kernels", lambda name, sample: _KERNELS.get(name))
