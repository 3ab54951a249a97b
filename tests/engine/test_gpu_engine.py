"""A GPU engine, as far as it runs without one: whatever comes when, tokens are those of a host's engine,
and where its device is lost it ends and says why."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.driver import Driver, drive
from tests.engine.gpu_stand_in import UnsteadyDevice, stand_in
from tests.engine.graph_fakes import FakeGraphs
from tests.engine.oracle import make_adapter, make_model, make_prompt
from tests.streams import Device
from tests.waiting import PATIENCE_S
from toppings.engine.engine import Engine
from toppings.ops.device_faults import is_sticky

NUM_SEEDS = int(os.environ.get("TOPPINGS_RANDOM_SEEDS", "2"))
"""300 take some ten minutes."""
RANKS = {"r4": 4, "r32": 32, "r16": 16, "r3": 3, "r40": 40}
SETTINGS = {"max_num_seqs": 6, "max_num_batched_tokens": 48, "max_model_len": 96, "page_size": 4}

Checkpoints = tuple[Path, dict[str, Path]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("gpu-engine")
    model = make_model(root / "model")
    ranks = enumerate(RANKS.items())
    return model, {name: make_adapter(root / name, model, rank=rank, seed=i) for i, (name, rank) in ranks}


def play(driver: Driver, seed: int) -> dict[str, list[int]]:
    """Requests of every kind at odd moments, some of which are aborted."""
    rng = random.Random(seed)
    gone = []
    for i in range(24):
        sampling = {"temperature": 0.9, "seed": i} if rng.random() < 0.4 else {}
        adapter = rng.choice([None, *RANKS])
        driver.add(f"{i}", make_prompt(i, rng.randrange(1, 60)), rng.randrange(1, 12), adapter, **sampling)
        for _ in range(rng.randrange(3)):
            driver.step()
            driver.engine.poll()
        if rng.random() < 0.2:
            gone.append(f"{i}")
            driver.engine.abort(f"{i}")
    driver.run()
    return {name: tokens for name, tokens in driver.tokens.items() if name not in gone}


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_tokens_are_those_of_an_engine_on_the_host(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """With room for few adapters, so that they are loaded, evicted and moved while steps run ahead."""
    with drive(checkpoints[0], tmp_path / "host", checkpoints[1], mode="cached", **SETTINGS) as driver:
        expected = play(driver, seed)
    stand_in(monkeypatch, UnsteadyDevice(seed))
    graphs, scarce = FakeGraphs(), {"device_pool_bytes": 700 * 1024, **SETTINGS}
    model, adapters = checkpoints
    with drive(model, tmp_path / "gpu", adapters, mode="pipelined", graphs=graphs, **scarce) as driver:
        assert play(driver, seed) == expected
        counters = driver.engine.stats(0).counters
        replays = sum(graph.num_replays for graph in graphs.graphs)
        assert 0 < replays < counters["steps"]  # steps with loads under way are queued
        assert counters["device_evictions"] > 0


Serve = Callable[[int | None], int]


@pytest.fixture
def serve(checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Serves cold adapters until all is answered, or raises what ends the engine; how often the device was
    asked for something, from the first request on."""

    def run(fails_from: int | None) -> int:
        device = Device()
        device.is_idle = True
        stand_in(monkeypatch, device)
        state_dir = tmp_path / f"state-{fails_from}"
        with drive(checkpoints[0], state_dir, checkpoints[1], mode="pipelined", max_num_seqs=4) as driver:
            num_before = device.num_calls
            if fails_from is not None:
                device.fails_from = num_before + fails_from
            for i, name in enumerate([*RANKS][:4]):
                driver.add(f"{i}", make_prompt(i, 12), 5, name, temperature=float(i % 2))
            _loop(driver.engine, driver.step)
            assert [len(tokens) for tokens in driver.tokens.values()] == [5] * 4
            return device.num_calls - num_before

    return run


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
