"""Decode steps replayed from graphs give the tokens of steps that are not, whatever comes and goes."""

from pathlib import Path

import pytest

from tests.engine import tile_kernels
from tests.engine.driver import Driver, drive
from tests.engine.graph_fakes import FakeGraphs
from tests.engine.oracle import make_adapter, make_model, make_prompt
from toppings.engine import build
from toppings.engine.decode_graphs import batch_sizes
from toppings.engine.graphs import GROUP_SETS
from toppings.engine.prompt_graphs import row_counts
from toppings.ops import attention, dispatch, lora

ADAPTERS: dict[str, dict[str, object]] = {
    "qkv-r64": {"rank": 64, "targets": ("q_proj", "k_proj", "v_proj")},
    "v-r1": {"rank": 1, "targets": ("v_proj",)},
    "qo-r16": {"rank": 16, "targets": ("q_proj", "o_proj")},
    "all-r8": {"rank": 8},
    "down-r3": {"rank": 3, "targets": ("down_proj",)},
    "kup-r256": {"rank": 256, "targets": ("k_proj", "up_proj")},
}
NAMES = (None, *ADAPTERS)
SETTINGS = {"max_num_seqs": 20, "max_num_batched_tokens": 64, "max_model_len": 96}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("graphs")
    model = make_model(root / "model")
    adapters = {
        name: make_adapter(root / name, model, seed=i, **kind)  # type: ignore[arg-type]
        for i, (name, kind) in enumerate(ADAPTERS.items())
    }
    return model, adapters


def run_everything(driver: Driver) -> dict[str, list[int]]:
    """Batches of every size that ends at different times, then every adapter alone, evicted and loaded anew,
    with aborts in between."""
    for i in range(20):
        driver.add(f"mixed {i}", make_prompt(i, 3 + i), 8 + i, NAMES[i % len(NAMES)])
    driver.run()
    for turn in range(2):
        for i, name in enumerate(NAMES):
            driver.add(f"{name} {turn}", make_prompt(i, 20), 6, name)
            driver.add(f"gone {name} {turn}", make_prompt(i, 20), 20, name)
            for _ in range(3 + i % 3):
                driver.step()
            driver.engine.abort(f"gone {name} {turn}")
            driver.run()
    for num in batch_sizes(20):  # these begin together, however slow loads are
        for i in range(num):
            driver.add(f"{i} of {num}", make_prompt(i, 3), 5, "all-r8")
        driver.run()
    for name in (None, "v-r1", "qo-r16"):
        driver.add(f"{name} alone", make_prompt(0, 3), 5, name)
        driver.run()
    return {name: tokens for name, tokens in driver.tokens.items() if not name.startswith("gone")}


@pytest.mark.parametrize("form", ["mbgmv", "bgmv"])
def test_replayed_steps_give_the_same_tokens(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path, form: str
) -> None:
    model, adapters = checkpoints
    with drive(model, tmp_path / "eager", adapters, mode="on_demand", **SETTINGS) as driver:
        expected = run_everything(driver)
    backend, scarce = FakeGraphs(), {"device_pool_bytes": 1200 * 1024, "mode": "on_demand", **SETTINGS}
    scarce["decode_lora_form"] = form
    with drive(model, tmp_path / "graphs", adapters, graphs=backend, **scarce) as driver:
        assert run_everything(driver) == expected
        stats = driver.engine.stats(0)
    assert stats.counters["device_evictions"] > 0
    sizes = batch_sizes(20)
    used = [graph.num_replays > 0 for graph in backend.graphs]
    assert len(used) == len(sizes) * len(GROUP_SETS)
    assert all(any(used[i : i + len(GROUP_SETS)]) for i in range(0, len(used), len(GROUP_SETS)))  # every size
    assert all(any(used[i :: len(GROUP_SETS)]) for i in range(len(GROUP_SETS)))  # every set of groups


def run_mixed(driver: Driver) -> dict[str, list[int]]:
    """Prompts of many lengths, in chunks, beside decodes of other adapters; sampled and greedy."""
    for i in range(24):
        sampling = {"temperature": 0.9, "seed": i} if i % 3 == 0 else {}
        name = NAMES[i % len(NAMES)]
        driver.add(f"{i}", make_prompt(i, 1 + 7 * (i % 11)), 2 + i % 7, name, **sampling)
        driver.step()
    return driver.run()


def test_steps_with_prompts_are_replayed_and_give_the_same_tokens(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapters = checkpoints
    with drive(model, tmp_path / "eager", adapters, mode="cached", **SETTINGS) as driver:
        expected = run_mixed(driver)
    serving = {"attention": tile_kernels, "lora": tile_kernels}
    for module in (dispatch, attention, lora):
        monkeypatch.setattr(module, "gpu_kernels", lambda name, sample: serving.get(name))
    backend, settings = FakeGraphs(), {**SETTINGS, "async_scheduling": "on"}
    with drive(model, tmp_path / "graphs", adapters, mode="cached", graphs=backend, **settings) as driver:
        assert run_mixed(driver) == expected
        steps = driver.engine.stats(0).counters["steps"]
    assert len(backend.graphs) == (len(batch_sizes(20)) + 1) * len(GROUP_SETS)  # one size of 64 rows
    assert sum(graph.num_replays for graph in backend.graphs) == steps
    assert sum(graph.num_replays for graph in backend.graphs[-len(GROUP_SETS) :]) > 10


def test_sizes_of_steps_with_prompts_are_between_the_sequences_and_the_tokens_of_a_step() -> None:
    assert row_counts(20, 64) == (64,)
    assert row_counts(20, 8) == (64,)
    assert row_counts(64, 2048) == (64, 128, 256, 512)
    assert row_counts(200, 300) == (256,)
    assert row_counts(600, 2048) == ()


def test_sizes_reach_the_number_of_requests_that_may_run() -> None:
    assert batch_sizes(1) == (1,)
    assert batch_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert batch_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_steps_recorded_on_the_cpu_give_the_same_tokens(
    checkpoints: tuple[Path, dict[str, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantization: str,
) -> None:
    model, adapters = checkpoints
    scarce = {"device_pool_bytes": 1200 * 1024, "mode": "on_demand", "quantization": quantization, **SETTINGS}
    with drive(model, tmp_path / "recorded", adapters, **scarce) as driver:
        recorded = run_everything(driver)
        (graphs,) = driver.engine._runner.graphs  # type: ignore[attr-defined]
        assert graphs.num_replays > 50
    monkeypatch.setattr(build, "can_record", lambda decoder: False)
    with drive(model, tmp_path / "called", adapters, **scarce) as driver:
        assert run_everything(driver) == recorded
        assert not driver.engine._runner.graphs  # type: ignore[attr-defined]


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantization": "int8"}], ids=str)
def test_a_mixture_of_experts_is_not_recorded(settings: dict[str, str], tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "mixtral")
    with drive(model, tmp_path / "state", {}, **settings) as driver:
        driver.add("alone", make_prompt(0, 3), 6)
        assert len(driver.run()["alone"]) == 6
        assert not driver.engine._runner.graphs  # type: ignore[attr-defined]
