"""Tokens that come behind cached ones are those of transformers + PEFT, and nobody's cache is another's."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.driver import Driver, drive
from tests.engine.graph_fakes import FakeGraphs
from tests.engine.oracle import make_adapter, make_model, make_prompt, reference_tokens
from toppings.engine.model_runner import StepInFlight
from toppings.sampling_params import SamplingParams

ADAPTERS: dict[str, dict[str, Any]] = {
    "all-r8": {"rank": 8},
    "qkv-r32": {"rank": 32, "targets": ("q_proj", "k_proj", "v_proj")},
    "mlp-r5-rslora": {"rank": 5, "targets": ("gate_proj", "up_proj", "down_proj"), "use_rslora": True},
}
NAMES = (None, *ADAPTERS)
NUM_TOKENS = 10
PAGE_BYTES = 16 * 2 * 2 * 16 * 4 * 3  # tokens · (k, v) · kv heads · head dim · fp32 · layers
FEW = {"kv_cache_bytes": 14 * PAGE_BYTES, "max_model_len": 160}
COLD = {"device_pool_bytes": 170 * 1024, "host_store_bytes": 250 * 1024, "link_gbps": 0.05}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("cached")
    model = make_model(root / "model")
    adapters = {
        name: make_adapter(root / name, model, seed=i, **kind)
        for i, (name, kind) in enumerate(ADAPTERS.items())
    }
    return model, adapters


def hits(driver: Driver) -> float:
    return driver.engine.stats(0).counters["prefix_cache_hits"]


def talk(driver: Driver) -> dict[str, tuple[list[int], str | None]]:
    """Three turns of a chat with base model and adapters, all together, each twice; what was asked."""
    asked: dict[str, tuple[list[int], str | None]] = {}
    history = {name: make_prompt(0, 40) for name in NAMES}
    for turn in range(3):
        for name in NAMES:
            history[name] = [*history[name], *make_prompt(turn + 1, 6)]
            for copy in range(2):
                asked[f"{name} {turn} {copy}"] = history[name], name
                driver.add(f"{name} {turn} {copy}", history[name], NUM_TOKENS, name)
        driver.run()
        for name in NAMES:
            history[name] = [*history[name], *driver.tokens[f"{name} {turn} 0"]]
    return asked


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 24, "max_num_seqs": 8},
        {"async_scheduling": "on", "mode": "on_demand", **FEW},
        {"graphs": FakeGraphs, "async_scheduling": "on", "page_size": 4},
        {"mode": "cpu_assisted", **COLD},
        {"mode": "pipelined", "enable_prefix_caching": "off"},
    ],
    ids=["chunked", "ahead with few pages", "graphs", "cold with workers", "off"],
)
def test_chats_match_the_oracle(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path, settings: dict[str, Any]
) -> None:
    model, adapters = checkpoints
    made = {name: value() if callable(value) else value for name, value in settings.items()}
    with drive(model, tmp_path, adapters, **made) as driver:
        asked = talk(driver)
        counters = driver.engine.stats(0).counters
        tokens, first = driver.tokens, driver.first
    for name, (prompt, adapter) in asked.items():
        expected = reference_tokens(model, adapters[adapter] if adapter else None, prompt, NUM_TOKENS)
        assert tokens[name] == expected, name
    if settings.get("enable_prefix_caching") == "off":
        assert counters["prefix_cache_queries"] == counters["prefix_cache_hits"] == 0
        return
    assert counters["prefix_cache_queries"] == sum(len(prompt) for prompt, _ in asked.values())
    assert counters["prefix_cache_hits"] == sum(output.num_cached_tokens or 0 for output in first.values())
    if "kv_cache_bytes" in settings:
        assert counters["prefix_cache_evictions"] > 0
    else:  # turns find the ones before, and each one's twin
        assert counters["prefix_cache_hits"] > 0.6 * counters["prefix_cache_queries"]
        # All that the turn before computed: its prompt of 62 tokens, and its answer but for the last one.
        assert [first[f"{name} 2 0"].num_cached_tokens for name in NAMES] == [71] * len(NAMES)


def test_the_same_tokens_of_another_adapter_or_salt_are_not_found(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    model, adapters = checkpoints
    prompt, params = make_prompt(9, 48), SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    with drive(model, tmp_path, adapters) as driver:
        ids = [None if name is None else driver.registry.get(name).adapter_id for name in NAMES]
        for salt in (None, "mine", "yours"):
            for name, adapter_id in zip(NAMES, ids, strict=True):
                driver.add_by_id(f"{name} {salt}", prompt, params, adapter_id, cache_salt=salt)
                driver.run()
                expected = reference_tokens(model, adapters[name] if name else None, prompt, 6)
                assert driver.tokens[f"{name} {salt}"] == expected
        assert hits(driver) == 0
        driver.add_by_id("again", prompt, params, ids[1], cache_salt="mine")
        driver.run()
        assert driver.first["again"].num_cached_tokens == 32
        driver.add_by_id("not cacheable", prompt, params, ids[1], cache_salt="mine", is_cacheable=False)
        driver.run()
        assert driver.first["not cacheable"].num_cached_tokens == 0
        assert driver.tokens["not cacheable"] == driver.tokens["again"]
        more = [*prompt, *driver.tokens["again"], *make_prompt(8, 3)]
        for name, salt, num_cached in (("other", "theirs", 0), ("next", "mine", 48 + 5)):
            driver.add_by_id(name, more, params, ids[1], cache_salt=salt)
            driver.run()
            assert driver.first[name].num_cached_tokens == num_cached
            assert driver.tokens[name] == reference_tokens(model, adapters["all-r8"], more, 6)


def test_a_reloaded_adapter_finds_nothing_and_leaves_no_pages_behind(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    model, adapters = checkpoints
    prompt = make_prompt(3, 64)
    with drive(model, tmp_path, {"a": adapters["all-r8"]}) as driver:
        pages = driver.engine.scheduler.pages
        for path in (adapters["all-r8"], adapters["qkv-r32"]):
            adapter_id = driver.registry.register("a", path, replace=True).adapter_id
            driver.add(str(path), prompt, 6, "a")
            driver.run()
            assert driver.first[str(path)].num_cached_tokens == 0
            assert driver.tokens[str(path)] == reference_tokens(model, path, prompt, 6)
            assert pages.num_blocks == 5  # the last of them a tail
            driver.engine.adapters.request_removal(adapter_id)
            assert driver.engine.is_removed(adapter_id)
            assert pages.num_blocks == 0
            driver.engine.check_integrity()


def test_a_step_that_fails_on_the_device_leaves_nothing_to_find(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = checkpoints
    prompt = make_prompt(4, 50)

    def fail(self: StepInFlight) -> None:
        raise ArithmeticError("broken")

    for ahead in ("off", "on"):
        with drive(model, tmp_path / ahead, {}, async_scheduling=ahead) as driver:
            driver.add("a", prompt, 6)
            with monkeypatch.context() as broken:
                broken.setattr(StepInFlight, "result", fail)
                driver.step()
            assert driver.errors() == {"a": "the engine failed: broken"}
            driver.add("b", prompt, 6)
            assert driver.run()["b"] == reference_tokens(model, None, prompt, 6)
            assert driver.first["b"].num_cached_tokens == 0


def test_a_shared_prompt_is_computed_once_however_many_choices_there_are(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    model, adapters = checkpoints
    prompt = make_prompt(5, 100)
    with drive(model, tmp_path, adapters, max_num_batched_tokens=40, max_num_seqs=8) as driver:
        for i in range(4):
            driver.add(f"{i}", prompt, 6, "qkv-r32", seed=i, temperature=0.8)
        driver.add("greedy", prompt, 6, "qkv-r32")
        tokens = driver.run()
        assert hits(driver) == 4 * 96
        assert driver.engine.stats(0).counters["prefix_cache_waits"] == 4
    assert tokens["greedy"] == reference_tokens(model, adapters["qkv-r32"], prompt, 6)
