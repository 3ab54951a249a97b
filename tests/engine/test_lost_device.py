"""A CUDA context that is lost in the middle of whatever is asked of it: the engine ends and says why.

The engine is a real one, on the host; its loader, its staging and its sampler are those of a GPU, over
streams and events that are not there (tests/streams.py).
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.driver import drive
from tests.engine.oracle import make_adapter, make_model, make_prompt
from tests.streams import Device
from toppings.adapters import manager
from toppings.adapters.cuda_loader import CudaLoader
from toppings.engine import build
from toppings.engine.drawing import DeviceSampler
from toppings.engine.engine import Engine
from toppings.engine.model_runner import ModelRunner
from toppings.engine.staging import Staging
from toppings.engine.step_inputs import InputBuilder
from toppings.ops.device_faults import is_sticky

PATIENCE_S = 30.0
Serve = Callable[[int | None], int]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("lost")
    model = make_model(root / "model")
    return model, {f"a{i}": make_adapter(root / f"a{i}", model, rank=4, seed=i) for i in range(3)}


@pytest.fixture
def serve(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Serve:
    """Serves cold adapters until all is answered, or raises what ends the engine; how often the device was
    asked for something, from the first request on."""

    def run(fails_from: int | None) -> int:
        device = Device()
        device.is_idle = True
        staging = Staging(torch.device("cpu"), device)
        runner = partial(ModelRunner, sample=DeviceSampler(staging, device), runs_ahead=True)
        monkeypatch.setattr(manager, "_make_loader", lambda pool, *_: CudaLoader(pool.arena, cuda=device))

        def make_runner(*arguments: Any) -> ModelRunner:
            config, decoder, cache, adapters, mode, max_len, _, form = arguments
            inputs = InputBuilder(config.page_size, max_len, staging)
            return runner(decoder, cache, adapters, mode, inputs=inputs, decode_form=form)

        monkeypatch.setattr(build, "make_runner", make_runner)
        with drive(*_in(tmp_path, checkpoints), mode="pipelined", max_num_seqs=4) as driver:
            num_before = device.num_calls
            if fails_from is not None:
                device.fails_from = num_before + fails_from
            for i in range(4):
                driver.add(f"{i}", make_prompt(i, 12), 5, f"a{i % 3}", temperature=float(i % 2))
            _loop(driver.engine, driver.step)
            assert [len(tokens) for tokens in driver.tokens.values()] == [5] * 4
            return device.num_calls - num_before

    return run


def _in(folder: Path, checkpoints: tuple[Path, dict[str, Path]]) -> tuple[Path, Path, dict[str, Path]]:
    model, adapters = checkpoints
    return model, folder / f"state-{time.monotonic_ns()}", adapters


def _loop(engine: Engine, step: Callable[[], object]) -> None:
    """As engine/loop.py: whatever is raised here ends the process, and is what clients are told."""
    stop_at = time.monotonic() + PATIENCE_S
    while engine.has_requests:
        step()
        engine.poll()
        assert time.monotonic() < stop_at, "the engine neither ends nor goes on"


def test_wherever_the_context_is_lost_the_engine_ends_and_says_why(serve: Serve) -> None:
    num_calls = serve(None)
    assert num_calls > 60
    for fails_from in (1, 3, 9, num_calls // 2):
        with pytest.raises(RuntimeError, match="CUDA error: an illegal memory access") as lost:
            serve(fails_from)
        assert is_sticky(lost.value)
