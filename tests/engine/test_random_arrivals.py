"""Random arrivals and aborts over scarce pages and adapter memory: nothing lost, nothing answered twice."""

import random
import time
from pathlib import Path

import pytest

from tests.engine.driver import LIMIT_S, Driver, drive
from tests.engine.oracle import make_adapter, make_model, make_prompt
from toppings.core import FinishReason

NUM_REQUESTS = 80
PAGE_BYTES = 16 * 2 * 2 * 16 * 4 * 3  # tokens · (k, v) · kv heads · head dim · fp32 · layers
Requests = dict[str, tuple[list[int], int, str | None]]
"""By name: prompt, number of tokens to generate, adapter."""
RANKS = {"r2": 2, "r4": 4, "r8": 8, "r16": 16}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("random")
    model = make_model(root / "model")
    return model, {name: make_adapter(root / name, model, rank=rank) for name, rank in RANKS.items()}


@pytest.fixture(scope="module")
def requests() -> Requests:
    rng = random.Random(0)
    return {
        f"r{i}": (make_prompt(i, rng.randint(1, 60)), rng.randint(1, 24), rng.choice([None, *RANKS]))
        for i in range(NUM_REQUESTS)
    }


@pytest.fixture(scope="module")
def expected(
    checkpoints: tuple[Path, dict[str, Path]], requests: Requests, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[int]]:
    """The tokens of each request alone, with room for everything."""
    model, adapters = checkpoints
    with drive(model, tmp_path_factory.mktemp("reference"), adapters) as driver:
        for name, (prompt, num_tokens, adapter) in requests.items():
            driver.add(name, prompt, num_tokens, adapter)
            driver.run()
        return driver.tokens


def run_randomly(driver: Driver, requests: Requests) -> set[str]:
    """Adds all requests at random steps and aborts some of them; the names of those aborted."""
    rng = random.Random(1)
    todo, aborted = list(requests.items()), set()
    stop_at = time.monotonic() + LIMIT_S
    while todo or driver.engine.has_requests:
        assert time.monotonic() < stop_at, "requests do not end"
        while todo and rng.random() < 0.4:
            name, (prompt, num_tokens, adapter) = todo.pop()
            driver.add(name, prompt, num_tokens, adapter)
        open_names = [name for name in driver.tokens if name not in driver.last and name not in aborted]
        if open_names and rng.random() < 0.03:
            aborted.add(name := rng.choice(open_names))
            driver.engine.abort(name)
        driver.step()
        driver.engine.scheduler.check_integrity()
    driver.engine.check_integrity()
    return aborted


@pytest.mark.parametrize(("mode", "ahead"), [("pipelined", "off"), ("on_demand", "off"), ("pipelined", "on")])
def test_every_request_ends_once_with_its_own_tokens(
    checkpoints: tuple[Path, dict[str, Path]],
    requests: Requests,
    expected: dict[str, list[int]],
    tmp_path: Path,
    mode: str,
    ahead: str,
) -> None:
    model, adapters = checkpoints
    scarce = {
        "kv_cache_bytes": 8 * PAGE_BYTES,
        "max_model_len": 96,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 48,
        "device_pool_bytes": 250 * 1024,  # the adapters together take 400 KiB
        "host_store_bytes": 300 * 1024,
        "max_adapter_wait_s": 0.005,
        "mode": mode,
        "async_scheduling": ahead,
    }
    with drive(model, tmp_path / "scarce", adapters, **scarce) as driver:
        aborted = run_randomly(driver, requests)
        stats = driver.engine.stats(0)
    assert set(driver.last) == set(requests) - aborted
    assert all(output.finish_reason is FinishReason.LENGTH for output in driver.last.values())
    assert {name: driver.tokens[name] for name in driver.last} == {
        name: expected[name] for name in driver.last
    }
    assert (stats.kv_pages_used, stats.num_running, stats.num_waiting) == (0, 0, 0)
    assert all(status.num_running == 0 for status in stats.adapters)
    assert stats.counters["preemptions"] > 0
    assert stats.counters["device_evictions"] > 0
    assert stats.counters["drains"] > 0
    assert 3 < len(aborted) < NUM_REQUESTS
