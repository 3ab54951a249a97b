"""Steps that start before the tokens of the ones before are known give the same tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.driver import Driver, drive
from tests.engine.graph_fakes import FakeGraphs
from tests.engine.oracle import make_adapter, make_model, make_prompt
from toppings.core import Batch, FinishReason
from toppings.engine.base import model_config
from toppings.engine.model_runner import ModelRunner, StepInFlight

ADAPTERS: dict[str, dict[str, object]] = {
    "qkv-r16": {"rank": 16, "targets": ("q_proj", "k_proj", "v_proj")},
    "all-r8": {"rank": 8},
    "down-r3": {"rank": 3, "targets": ("down_proj",)},
    "qo-r64": {"rank": 64, "targets": ("q_proj", "o_proj")},
}
NAMES = (None, *ADAPTERS)
SETTINGS = {
    "max_num_seqs": 6,
    "max_num_batched_tokens": 24,
    "max_model_len": 64,
    "mode": "on_demand",
    "page_size": 4,
}
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.0, "seed": 8, "top_k": 9, "top_p": 0.9},
    {"logprobs": 2},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"min_tokens": 5},
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("ahead")
    model = make_model(root / "model")
    adapters = {
        name: make_adapter(root / name, model, seed=i, **kind)  # type: ignore[arg-type]
        for i, (name, kind) in enumerate(ADAPTERS.items())
    }
    return model, adapters


@pytest.fixture
def num_ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many steps were started on top of another."""
    seen: list[StepInFlight] = []
    start = ModelRunner.start

    def counted(self: ModelRunner, batch: Batch, previous: StepInFlight | None = None) -> StepInFlight:
        seen.extend([] if previous is None else [previous])
        return start(self, batch, previous)

    monkeypatch.setattr(ModelRunner, "start", counted)
    return lambda: len(seen)


def run_everything(driver: Driver, stops: dict[str, int]) -> dict[str, list[int]]:
    """More requests than may run, of every kind, with prompts in chunks; some are aborted. `stops`: by
    request, a token at which it ends."""
    for i in range(18):
        kind = dict(KINDS[i % len(KINDS)])
        if (stop := stops.get(f"{i}")) is not None:
            kind["stop_token_ids"] = (stop,)
        driver.add(f"{i}", make_prompt(i, 3 + 2 * i), 7 + i % 5, NAMES[i % len(NAMES)], **kind)
        if i % 4 == 0:
            driver.add(f"gone {i}", make_prompt(i, 9), 30, NAMES[(i + 1) % len(NAMES)])
        driver.step()
        if i % 4 == 3:
            driver.engine.abort(f"gone {i - 3}")
    driver.run()
    driver.add("to the limit", make_prompt(1, 50), 40)
    driver.run()
    return {name: tokens for name, tokens in driver.tokens.items() if not name.startswith("gone")}


NUM_FEW_PAGES = 18


def page_bytes(driver: Driver) -> int:
    model = model_config(driver.config)
    return 2 * model.num_layers * model.kv_size * 4 * driver.config.page_size


@pytest.mark.parametrize("has_graphs", [False, True])
@pytest.mark.parametrize("has_few_pages", [False, True])
def test_tokens_are_those_of_steps_in_turn(
    checkpoints: tuple[Path, dict[str, Path]],
    tmp_path: Path,
    num_ahead: Callable[[], int],
    has_graphs: bool,
    has_few_pages: bool,
) -> None:
    model, adapters = checkpoints
    settings = {**SETTINGS, "async_scheduling": "off"}
    with drive(model, tmp_path / "whole", adapters, **settings) as driver:
        whole = run_everything(driver, {})
    stops = {name: tokens[4] for i, (name, tokens) in enumerate(whole.items()) if i % 3 == 0}
    with drive(model, tmp_path / "in turn", adapters, **settings) as driver:
        expected = run_everything(driver, stops)
        reasons = {name: output.finish_reason for name, output in driver.last.items()}
    assert FinishReason.STOP in reasons.values()
    assert num_ahead() == 0
    settings["async_scheduling"] = "on"
    if has_few_pages:
        settings["kv_cache_bytes"] = NUM_FEW_PAGES * page_bytes(driver)
    if has_graphs:
        settings["graphs"] = FakeGraphs()
    with drive(model, tmp_path / "ahead", adapters, **settings) as driver:
        assert run_everything(driver, stops) == expected
        assert {name: o.finish_reason for name, o in driver.last.items()} == reasons
        counters = driver.engine.stats(0).counters
    assert num_ahead() > 20
    assert bool(counters["preemptions"]) == has_few_pages
    assert counters["generation_tokens"] >= sum(map(len, expected.values()))


def test_an_ended_request_leaves_nothing_behind(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path, num_ahead: Callable[[], int]
) -> None:
    """Its adapter can be removed and its name used again, while a step that still holds it is under way."""
    model, adapters = checkpoints
    with drive(model, tmp_path, adapters, **SETTINGS, async_scheduling="on") as driver:
        adapter_id = driver.registry.get("all-r8").adapter_id
        driver.add("a", make_prompt(1, 5), 40, "all-r8")
        while not num_ahead():
            driver.step()
        driver.engine.abort("a")
        driver.engine.adapters.request_removal(adapter_id)
        assert driver.engine.is_removed(adapter_id)
        driver.last.pop("a", None)
        driver.add("a", make_prompt(2, 7), 5)
        driver.run()
        again = driver.tokens["a"]
        driver.add("b", make_prompt(2, 7), 5)
        assert driver.run()["b"] == again
        assert len(again) == 5


def test_a_step_that_fails_on_the_device_ends_its_requests_and_no_others(
    checkpoints: tuple[Path, dict[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_ahead: Callable[[], int],
) -> None:
    model, adapters = checkpoints
    with drive(model, tmp_path, adapters, **SETTINGS, async_scheduling="on") as driver:
        driver.add("a", make_prompt(1, 5), 40, "all-r8")
        while not num_ahead():
            driver.step()

        def fail(self: StepInFlight) -> None:
            raise ArithmeticError("broken")

        with monkeypatch.context() as broken:
            broken.setattr(StepInFlight, "result", fail)
            driver.step()
        assert driver.errors() == {"a": "the engine failed: broken"}
        driver.add("b", make_prompt(1, 5), 9, "all-r8")
        driver.add("c", make_prompt(1, 5), 9, "all-r8")
        tokens = driver.run()
        assert tokens["b"] == tokens["c"]
        assert tokens["b"][: len(tokens["a"])] == tokens["a"][:9]
