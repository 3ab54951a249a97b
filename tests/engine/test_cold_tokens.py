"""Cold prefills, computed in part by CPU workers, give the tokens of an engine that holds every adapter."""

import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.assist.stream_fakes import EagerOps
from tests.engine.driver import Driver, drive
from tests.engine.oracle import make_adapter, make_model, make_prompt
from tests.waiting import first_good, wait_until
from toppings.engine import build
from toppings.engine.assist import Assist

RANKS = (1, 8, 64, 256)
PROMPTS = (1, 13, 64, 257, 600)
NUM_TOKENS = 4
NUM_ROUNDS = 2  # of faults
SLOW_LINK_GBPS = 0.02  # rank 256 takes 0.2 s


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("cold")
    model = make_model(root / "model")
    adapters = {f"r{rank}": make_adapter(root / f"r{rank}", model, rank=rank, seed=rank) for rank in RANKS}
    return model, adapters


@pytest.fixture(scope="module")
def expected(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[int]]:
    """Tokens by request of an engine whose adapters are all on the device, each request alone."""
    model, adapters = checkpoints
    with drive(model, tmp_path_factory.mktemp("state"), adapters, mode="cached") as driver:
        for name in adapters:
            for num in PROMPTS:
                driver.add(f"{name} {num}", make_prompt(num, num), NUM_TOKENS, name)
                driver.run()
        return driver.tokens


def add_all(driver: Driver, adapters: dict[str, Path], suffix: str = "") -> None:
    """Every prompt through every adapter, all at once, with requests of the base model between them."""
    for num in PROMPTS:
        driver.add(f"base {num}{suffix}", make_prompt(num, num), NUM_TOKENS)
        for name in adapters:
            driver.add(f"{name} {num}{suffix}", make_prompt(num, num), NUM_TOKENS, name)


def worker_pids() -> set[int]:
    """Processes of this one that run assist workers."""
    pids = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_child = int(process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1]) == os.getpid()
            if is_child and b"toppings.assist.worker" in process.joinpath("cmdline").read_bytes():
                pids.add(int(process.name))
    return pids


def assist_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines made from here on exchange rows and results as on a GPU, in the order of a stream."""
    monkeypatch.setattr(build, "Assist", partial(Assist, stream_ops=EagerOps()))


@pytest.mark.parametrize("mode", ["cpu_assisted", "cpu_shrink"])
@pytest.mark.parametrize(("budget", "is_ordered"), [(96, False), (2048, False), (96, True)])
def test_cold_adapters_at_once_whole_and_chunked(
    checkpoints: tuple[Path, dict[str, Path]],
    expected: dict[str, list[int]],
    tmp_path: Path,
    mode: str,
    budget: int,
    is_ordered: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_ordered:
        assist_in_order(monkeypatch)
    model, adapters = checkpoints
    settings = {"mode": mode, "link_gbps": SLOW_LINK_GBPS, "max_num_batched_tokens": budget}

    def run() -> dict[str, float]:
        with drive(model, tmp_path, adapters, **settings) as driver:
            add_all(driver, adapters)
            tokens = driver.run()
            assert {name: tokens[name] for name in expected} == expected
            return driver.engine.stats(0).counters

    counters = first_good(run, landed_on_the_way)
    assert landed_on_the_way(counters), counters


def landed_on_the_way(counters: dict[str, float]) -> bool:
    """Not before the first product, nor after the last one."""
    return 0 < counters["assist_cpu_products"] < counters["assist_cold_products"]


def has_replaced_a_worker(driver: Driver) -> bool:
    driver.engine.poll()  # as an idle engine's loop does
    return driver.engine.stats(0).counters["assist_worker_restarts"] > 0


def kill_one(pids: list[int]) -> None:
    os.kill(random.choice(pids), signal.SIGKILL)


def stop_one(pids: list[int]) -> None:
    os.kill(random.choice(pids), signal.SIGSTOP)


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@contextmanager
def trouble(fault: Callable[[list[int]], None], spared: set[int]) -> Iterator[None]:
    """The fault strikes the workers, but those `spared`, again and again."""
    is_over = threading.Event()

    def strike() -> None:
        while not is_over.wait(0.05):
            with suppress(ProcessLookupError):
                if pids := list(worker_pids() - spared):
                    fault(pids)
                    is_over.wait(0.4)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@pytest.mark.parametrize(
    ("fault", "is_ordered"), [(kill_one, False), (stop_one, False), (kill_all, False), (kill_one, True)]
)
def test_requests_survive_faults_of_the_workers(
    checkpoints: tuple[Path, dict[str, Path]],
    expected: dict[str, list[int]],
    tmp_path: Path,
    fault: Callable[[list[int]], None],
    is_ordered: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if is_ordered:
        assist_in_order(monkeypatch)
    model, adapters = checkpoints
    spared = worker_pids()  # of other tests, whose fixtures still stand
    settings = {"mode": "cpu_assisted", "link_gbps": SLOW_LINK_GBPS / 2, "assist_workers": 2}
    # Room for the largest adapter and little more: every round is cold again.
    with drive(model, tmp_path, adapters, device_pool_bytes=4 * 2**20, **settings) as driver:
        with trouble(fault, spared):
            for number in range(NUM_ROUNDS):
                add_all(driver, adapters, f" {number}")
                driver.run()
        wait_until(lambda: has_replaced_a_worker(driver))
    for number in range(NUM_ROUNDS):
        assert {name: driver.tokens[f"{name} {number}"] for name in expected} == expected
    assert not driver.errors()
    assert worker_pids() <= spared


def test_files_that_vanish_cost_a_repair_or_one_clear_error(
    checkpoints: tuple[Path, dict[str, Path]], expected: dict[str, list[int]], tmp_path: Path
) -> None:
    """r8's packed file is made again from its checkpoint; r64 has lost that too."""
    model, adapters = checkpoints
    adapters = adapters | {"r64": shutil.copytree(adapters["r64"], tmp_path / "copy")}
    settings = {"mode": "cpu_assisted", "link_gbps": SLOW_LINK_GBPS}
    with drive(model, tmp_path / "state", adapters, **settings) as driver:
        for name in ("r8", "r64"):
            Path(driver.registry.get(name).packed_path).unlink()
        shutil.rmtree(adapters["r64"])
        add_all(driver, adapters)
        tokens = driver.run()
        errors = driver.errors()
    assert set(errors) == {f"r64 {num}" for num in PROMPTS}
    assert all(str(adapters["r64"]) in str(error) for error in errors.values()), errors
    assert [tokens[name] for name in expected if name not in errors] == [
        expected[name] for name in expected if name not in errors
    ]
