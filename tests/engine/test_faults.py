"""An engine that cannot go on says so, one that can goes on; and what it costs to ask it."""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.driver import Driver, drive
from tests.engine.oracle import make_adapter, make_model, make_prompt
from tests.waiting import wait_until
from toppings.core import Batch, Request
from toppings.engine.drawing import Drawing
from toppings.engine.engine import MAX_FAILURES
from toppings.engine.model_runner import ModelRunner, StepInFlight, StepResult
from toppings.messages import AdapterStatus, AddRequest
from toppings.ops.device_faults import is_sticky
from toppings.ops.sampling import SamplingRow
from toppings.sampling_params import SamplingParams
from toppings.vital import EngineLostError


class FailingRunner:
    """Fails as it is told to, then runs."""

    def __init__(self, driver: Driver) -> None:
        self.errors: list[Exception] = []
        self._runner = driver.engine._runner

    def start(self, batch: Batch, previous: StepInFlight | None = None) -> StepInFlight:
        if self.errors:
            raise self.errors.pop()
        return self._runner.start(batch, previous)

    def can_run_ahead(self, requests: Sequence[Request]) -> bool:
        return False

    def forget(self, request: Request) -> None:
        self._runner.forget(request)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    root = tmp_path_factory.mktemp("faults")
    model = make_model(root / "model")
    adapters: dict[str, Path] = {f"a{i}": make_adapter(root / f"a{i}", model, rank=4) for i in range(3)}
    with drive(model, root / "state", adapters) as driver:
        yield driver


@pytest.fixture
def runner(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> FailingRunner:
    runner = FailingRunner(driver)
    monkeypatch.setattr(driver.engine, "_runner", runner)
    driver.engine._num_failures = 0
    return runner


def ask(driver: Driver, name: str) -> None:
    driver.add(name, make_prompt(0, 9), 3)


@pytest.mark.parametrize("name", ["items", "token_ids", "logprobs"])
def test_a_step_that_draws_too_few_tokens_loses_no_request_silently(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    take = StepInFlight.result

    def too_few(flight: StepInFlight) -> StepResult:
        result = take(flight)
        return replace(result, **{name: getattr(result, name)[:-1]})

    for i in range(2):
        ask(driver, f"short-{name}-{i}")
    monkeypatch.setattr(StepInFlight, "result", too_few)
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        driver.run()
    driver.engine.abort_all("the test is over")


def test_steps_that_fail_now_and_then_end_their_requests_alone(driver: Driver, runner: FailingRunner) -> None:
    for i in range(MAX_FAILURES + 2):
        runner.errors = [RuntimeError("once")]
        ask(driver, f"fails-{i}")
        driver.run()
        ask(driver, f"runs-{i}")
        driver.run()
        assert "once" in str(driver.errors()[f"fails-{i}"])
        assert len(driver.tokens[f"runs-{i}"]) == 3


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "logprobs": 2}])
def test_a_request_whose_logits_are_not_finite_fails_alone(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    runner = driver.engine._runner
    assert isinstance(runner, ModelRunner)
    take = runner._sample

    def spoil(logits: torch.Tensor, rows: list[SamplingRow]) -> Drawing:
        for i, row in enumerate(rows):
            if row.prompt_token_ids == make_prompt(1, 9) and row.output_token_ids:
                logits[i] = torch.nan
        return take(logits, rows)

    monkeypatch.setattr(runner, "_sample", spoil)
    name = f"not finite {len(sampling)}"
    driver.add(name, make_prompt(1, 9), 3, **sampling)
    driver.add(f"beside {name}", make_prompt(0, 9), 3)
    tokens = driver.run()
    assert "not finite" in str(driver.errors()[name])
    assert (len(tokens[name]), len(tokens[f"beside {name}"])) == (1, 3)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: unspecified launch failure"),
    ],
)
def test_a_device_that_has_lost_its_context_ends_the_engine(
    driver: Driver, runner: FailingRunner, error: Exception
) -> None:
    runner.errors = [error]
    ask(driver, f"lost-{id(error)}")
    with pytest.raises(EngineLostError, match=r"the device has failed.*CUDA error"):
        driver.step()
    driver.engine.abort_all("")


def test_memory_that_runs_out_does_not_end_the_engine(driver: Driver, runner: FailingRunner) -> None:
    assert not is_sticky(torch.OutOfMemoryError("CUDA out of memory"))
    runner.errors = [torch.OutOfMemoryError("CUDA out of memory")]
    ask(driver, "out-of-memory")
    driver.run()
    ask(driver, "after")
    assert len(driver.run()["after"]) == 3


def test_many_failed_steps_in_a_row_end_the_engine(driver: Driver, runner: FailingRunner) -> None:
    runner.errors = [RuntimeError("always")] * MAX_FAILURES
    for i in range(MAX_FAILURES - 1):
        ask(driver, f"always-{i}")
        driver.run()
    ask(driver, "last")
    with pytest.raises(EngineLostError, match=f"{MAX_FAILURES} steps in a row"):
        driver.step()
    driver.engine.abort_all("")


def test_a_thread_that_fails_ends_the_engine(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = driver.engine.adapters.host._thread
    monkeypatch.setattr(thread, "_failure", MemoryError())
    with pytest.raises(EngineLostError, match="adapter-reader"):
        driver.engine.poll()


def test_changes_add_up_to_the_whole(driver: Driver) -> None:
    """Told change by change through loads, requests, pins and removal, the client knows what it would if it
    were told everything each time."""
    engine = driver.engine
    engine.abort_all("")
    known = {status.adapter_id: status for status in engine.stats(0, only_changes=True).adapters}

    def look() -> tuple[list[AdapterStatus], list[AdapterStatus]]:
        for status in engine.stats(0, only_changes=True).adapters:
            known[status.adapter_id] = status
        told = [status for _, status in sorted(known.items()) if status.is_anywhere]
        return told, engine.stats(0).adapters

    def check() -> None:
        """Threads read and copy meanwhile, so that two looks may differ; not for long."""
        wait_until(lambda: operator.eq(*look()))

    ids = {name: driver.registry.get(name).adapter_id for name in ("a0", "a1", "a2")}
    engine.adapters.set_pinned(ids["a2"], True)
    for name in ids:
        driver.add(f"told-{name}", make_prompt(0, 9), 3, name)
        check()
    while engine.has_requests:
        driver.step()
        check()
    engine.adapters.set_pinned(ids["a2"], False)
    check()
    engine.adapters.request_removal(ids["a0"])
    wait_until(lambda: engine.is_removed(ids["a0"]))
    check()
    assert ids["a0"] not in [status.adapter_id for status in engine.stats(0).adapters]


def test_a_poll_of_an_idle_engine_tells_no_adapter_twice(driver: Driver) -> None:
    engine = driver.engine
    engine.stats(0, only_changes=True)
    assert engine.stats(0, only_changes=True).adapters == []
    assert len(engine.stats(0).adapters) >= 2


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_a_token_outside_the_vocabulary_is_refused_before_it_reaches_a_step(
    driver: Driver, token_id: int
) -> None:
    refusal = driver.engine.add(AddRequest("bad", [5, token_id], SamplingParams()))
    assert refusal is not None
    assert f"token id {token_id}" in str(refusal.error)
    assert not driver.engine.has_requests
