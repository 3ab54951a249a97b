"""An adapter folded into the base model's weights: tokens stay the oracle's, and the weights come back."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.engine.driver import Driver, drive, hold_link
from tests.engine.graph_fakes import FakeGraphs
from tests.engine.oracle import (
    ALL_LINEAR,
    all_linear,
    make_adapter,
    make_kind,
    make_model,
    make_prompt,
    reference_model,
    reference_tokens,
)
from toppings.config import ConfigError, EngineConfig
from toppings.engine import build
from toppings.engine.base import open_registry
from toppings.engine.fold_policy import FoldCosts
from toppings.engine.folded_base import FoldedBase
from toppings.engine.merged_mode import MergedMode
from toppings.ops.linear import Linear

NUM_TOKENS = 8
ALL = list(ALL_LINEAR)
KINDS: dict[str, Callable[[], LoraConfig]] = {
    "dora": lambda: LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=ALL),
    "bias": lambda: LoraConfig(r=3, lora_alpha=6, lora_bias=True, target_modules=ALL),
    "outer": lambda: LoraConfig(r=4, target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"]),
}
World = tuple[Path, dict[str, Path]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A family whose projections have biases."""
    root = tmp_path_factory.mktemp("merged")
    model = make_model(root / "model", "qwen2")
    adapters = {name: make_kind(root / name, model, kind(), seed=3) for name, kind in KINDS.items()}
    adapters["main"] = make_adapter(root / "main", model, rank=8, seed=1)
    adapters["qv"] = make_adapter(root / "qv", model, rank=5, targets=("q_proj", "v_proj"), seed=2)
    return model, adapters


@pytest.fixture(scope="module")
def expected(world: World) -> dict[str, list[int]]:
    model, adapters = world
    return {name: reference_tokens(model, adapters.get(name), *asked(name)) for name in names(world)}


def names(world: World) -> list[str]:
    return ["base", *sorted(world[1])]


def asked(name: str) -> tuple[list[int], int]:
    return make_prompt(len(name), 11 + 5 * len(name)), NUM_TOKENS


def merged_of(driver: Driver) -> MergedMode:
    """Which decides nothing by itself from now on."""
    merged = driver.engine.merged
    assert merged is not None
    merged.meter = lambda slot: FoldCosts(0.0, 0.0, float("inf"))
    return merged


def id_of(driver: Driver, name: str) -> int:
    return driver.registry.get(name).adapter_id


def fold(driver: Driver, name: str) -> FoldedBase:
    merged = merged_of(driver)
    merged.policy.target = id_of(driver, name)
    while not merged.folded.is_whole:
        driver.engine.poll()
    driver.engine.check_integrity()
    return merged.folded


def unfold(driver: Driver) -> None:
    merged = merged_of(driver)
    merged.policy.leave()
    while merged.folded.adapter_id is not None:
        driver.engine.poll()
    driver.engine.check_integrity()


def ask(driver: Driver, wanted: list[str], label: str) -> dict[str, list[int]]:
    for name in wanted:
        driver.add(f"{name} {label}", *asked(name), None if name == "base" else name)
    tokens = driver.run()
    return {name: tokens[f"{name} {label}"] for name in wanted}


def ask_all(driver: Driver, world: World, label: str) -> dict[str, list[int]]:
    return ask(driver, names(world), label)


def weights_of(folded: FoldedBase) -> list[torch.Tensor]:
    """All that may be changed, as it lies in memory."""
    return [piece.linear.stored.clone() for piece in folded.all_pieces if piece.linear.stored is not None]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


SETTINGS: dict[str, Any] = {"merged_mode": "auto", "enable_prefix_caching": "off"}


def serve(world: World, state_dir: Path, **settings: Any) -> AbstractContextManager[Driver]:
    return drive(world[0], state_dir, world[1], **{**SETTINGS, **settings})


FORMS: dict[str, dict[str, Any]] = {
    "eager": {},
    "chunked": {"max_num_batched_tokens": 8, "max_num_seqs": 6},
    "ahead": {"async_scheduling": "on"},
    "graphs": {"mode": "on_demand", "max_model_len": 96, "max_num_seqs": 8},
    "drafts": {"speculative_method": "ngram"},
}


@pytest.mark.parametrize("form", FORMS)
def test_tokens_of_every_kind_are_the_oracles_before_during_and_after_folding(
    world: World, expected: dict[str, list[int]], tmp_path: Path, form: str
) -> None:
    settings = {"graphs": FakeGraphs()} if form == "graphs" else {}
    with serve(world, tmp_path, **FORMS[form], **settings) as driver:
        assert ask_all(driver, world, "before") == expected
        folded = merged_of(driver).folded
        was = weights_of(folded)
        arena = driver.engine.adapters.pool.arena.clone()
        fold(driver, "main")
        assert not same(was, weights_of(folded))
        assert ask_all(driver, world, "folded") == expected
        for left in (5, 2):  # of twelve groups, the last ones are not folded
            while folded.num_folded > left:
                folded.unfold_last()
            assert ask_all(driver, world, f"{left} of 12") == expected
        unfold(driver)
        assert same(was, weights_of(folded))
        assert torch.equal(arena, driver.engine.adapters.pool.arena)
        assert ask_all(driver, world, "after") == expected
        fold(driver, "qv")
        assert ask_all(driver, world, "another") == expected
        assert driver.engine.stats(0).counters["merged_mode_folds"] == 2


@pytest.mark.parametrize("mode", ["cpu_assisted", "cpu_shrink"])
def test_cold_adapters_are_served_beside_a_folded_one(
    world: World, expected: dict[str, list[int]], tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(world, tmp_path, mode=mode, link_gbps=0.05) as driver:
        prompt, num_tokens = asked("main")
        driver.add("first", prompt, num_tokens, "main")
        assert driver.run()["first"] == expected["main"]
        fold(driver, "main")
        wanted = names(world)
        if mode == "cpu_assisted":
            hold_link(monkeypatch)
            wanted = ["base", "main", "qv"]
        assert ask(driver, wanted, "cold") == {name: expected[name] for name in wanted}
        if mode == "cpu_assisted":
            assert driver.engine.stats(0).counters["assist_cpu_products"] > 0


def test_steps_of_the_folded_adapter_alone_compute_no_lora(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(world, tmp_path, mode="cached") as driver:
        fold(driver, "main")
        monkeypatch.setattr("toppings.engine.device_lora.add_lora_", lambda *_, **__: pytest.fail("LoRA"))
        driver.add("main", *asked("main"), "main")
        assert len(driver.run()["main"]) == NUM_TOKENS


def test_preempted_requests_and_shared_prefixes_are_served_on_across_a_switch(
    world: World, expected: dict[str, list[int]], tmp_path: Path
) -> None:
    """A piece is folded or taken out between any two steps."""
    page_bytes = 4 * 2 * 2 * 16 * 4 * 3
    settings = {"page_size": 4, "max_model_len": 64, "kv_cache_bytes": 26 * page_bytes}
    with serve(world, tmp_path, mode="cached", enable_prefix_caching="on", **settings) as driver:
        merged = merged_of(driver)
        assert merged.policy.target is None
        targets = cycle([id_of(driver, "main")] * 9 + [None] * 6)
        for turn in range(2):
            for name in names(world):
                driver.add(f"{name} {turn}", *asked(name), None if name == "base" else name)
        while driver.engine.has_requests:
            driver.step()
            merged.policy.target = next(targets)
            merged.note_step([], 0.0, 0.0)  # the last step took no time: one piece is done
            driver.engine.poll()
        driver.engine.check_integrity()
        assert driver.engine.scheduler.num_preemptions > 0
        assert merged.folded.num_folded or merged.counters["merged_mode_unfolds"]
    for name in names(world):
        assert driver.tokens[f"{name} 0"] == driver.tokens[f"{name} 1"] == expected[name], name


@pytest.mark.parametrize("family", ["phi3", "gemma2", "qwen3_moe"])
def test_other_families_are_folded_as_well(tmp_path: Path, family: str) -> None:
    model = make_model(tmp_path / "model", family)
    adapters = {
        name: make_adapter(tmp_path / name, model, rank=4, targets=all_linear(family), seed=seed)
        for seed, name in enumerate(("main", "other"))
    }
    prompt = make_prompt(1, 20)
    with drive(model, tmp_path / "state", adapters, **SETTINGS, mode="cached") as driver:
        fold(driver, "main")
        for name in (None, *adapters):
            driver.add(f"{name}", prompt, NUM_TOKENS, name)
        tokens = driver.run()
    for name in (None, *adapters):
        assert tokens[f"{name}"] == reference_tokens(model, adapters.get(name or ""), prompt, NUM_TOKENS), (
            name
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_logits_differ_as_much_as_they_do_without_folding(
    world: World, tmp_path: Path, dtype: str
) -> None:
    """Log-probabilities of a prompt's tokens, against the oracle's in fp32; and the weights come back."""
    settings = {**SETTINGS, "mode": "cached", "dtype": dtype}
    prompt = make_prompt(4, 60)
    with drive(world[0], tmp_path, {name: world[1][name] for name in ("main", "qv")}, **settings) as driver:
        was = weights_of(merged_of(driver).folded)
        errors = []
        for label in ("plain", "folded"):
            if label == "folded":
                fold(driver, "main")
            errors.append(
                {name: error_of(driver, world, name, prompt, label) for name in (None, "main", "qv")}
            )
        unfold(driver)
        assert same(was, weights_of(merged_of(driver).folded))
    for name, plain in errors[0].items():
        assert plain > 0
        assert errors[1][name] < 2 * plain, (name, errors)


def error_of(driver: Driver, world: World, name: str | None, prompt: list[int], label: str) -> float:
    """Root of the mean square."""
    driver.add(f"{name} {label}", prompt, 0, name, prompt_logprobs=0)
    driver.run()
    told = driver.last[f"{name} {label}"].prompt_logprobs
    assert told is not None
    found = torch.tensor([each.logprob for each in told.tokens(prompt[1:])])
    model = reference_model(world[0], world[1].get(name or ""))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    wanted = logits.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    return float((found - wanted).square().mean().sqrt())


# --- who may be folded, and for how long ---


def test_kinds_that_are_more_than_a_and_b_are_not_folded(world: World, tmp_path: Path) -> None:
    with serve(world, tmp_path, mode="cached") as driver:
        can_fold = {name: driver.engine.adapters.can_fold(id_of(driver, name)) for name in world[1]}
    assert can_fold == {"dora": False, "bias": False, "outer": False, "main": True, "qv": True}


def test_an_adapter_that_is_unloaded_is_taken_out_first(world: World, tmp_path: Path) -> None:
    with serve(world, tmp_path, mode="cached") as driver:
        folded = fold(driver, "main")
        adapter_id = id_of(driver, "main")
        driver.engine.adapters.request_removal(adapter_id)
        assert not driver.engine.is_removed(adapter_id)
        merged_of(driver).note_step([], 60.0, 0.0)
        driver.engine.poll()
        while not driver.engine.is_removed(adapter_id):
            driver.engine.poll()
        assert folded.adapter_id is None
        assert not driver.engine.adapters.can_fold(adapter_id)
        driver.engine.check_integrity()


def test_one_that_has_the_room_another_waits_for_makes_way(world: World, tmp_path: Path) -> None:
    sizes = {}
    with serve(world, tmp_path, merged_mode="off") as driver:
        sizes = {name: driver.registry.get(name).num_bytes for name in world[1]}
    settings = {"device_pool_bytes": max(sizes["main"], sizes["dora"]) + 64}
    with serve(world, tmp_path, **settings) as driver:
        driver.add("first", *asked("main"), "main")
        driver.run()
        fold(driver, "main")
        driver.add("other", *asked("dora"), "dora")
        while driver.engine.has_requests:
            driver.step()
            driver.engine.poll()
        driver.run()
        assert driver.errors() == {}
        assert merged_of(driver).folded.adapter_id is None
    assert driver.tokens["other"] == reference_tokens(world[0], world[1]["dora"], *asked("dora"))


def test_where_folding_fails_the_adapter_is_served_as_before_and_left_alone(
    world: World, expected: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(world, tmp_path, mode="cached") as driver:
        merged = merged_of(driver)
        adapter_id = id_of(driver, "main")
        was, with_products, calls = weights_of(merged.folded), Linear.with_products, iter(range(100))

        def fail(self: Linear, parts: Any) -> torch.Tensor:
            if next(calls) == 5:
                raise RuntimeError("out of memory")
            return with_products(self, parts)

        monkeypatch.setattr(Linear, "with_products", fail)
        merged.policy.target = adapter_id
        for _ in range(40):
            driver.engine.poll()
        assert merged.folded.adapter_id is None
        assert same(was, weights_of(merged.folded))
        merged.policy.target = adapter_id
        driver.engine.poll()
        assert merged.folded.adapter_id is None
        assert ask_all(driver, world, "after") == expected


def test_an_adapter_whose_weights_copy_does_not_fit_is_not_folded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(world, tmp_path, mode="cached") as driver:
        merged = merged_of(driver)
        monkeypatch.setattr(merged, "_memory", lambda: 1000)
        merged.policy.target = id_of(driver, "main")
        driver.engine.poll()
        assert merged.folded.adapter_id is None
    monkeypatch.setattr(build, "memory_available", lambda: 1000)
    config = EngineConfig(model=str(world[0]), state_dir=str(tmp_path), dtype="float32", **SETTINGS)
    with pytest.raises(ConfigError, match=r"merged_mode .* bytes of host memory, and 1000 are free; use off"):
        build.build_engine(config)


@pytest.mark.parametrize(("name", "value"), [("quantization", "int8"), ("tensor_parallel_size", 2)])
def test_settings_that_do_not_go_together_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"merged_mode is 'auto', but {name} is {value!r}"):
        EngineConfig(merged_mode="auto", **{name: value})


def test_measured_costs_lead_to_folding_and_stats_tell_of_it(world: World, tmp_path: Path) -> None:
    """With nothing set by hand but what a switch costs: the load alone decides."""
    with serve(world, tmp_path, mode="cached") as driver:
        merged = driver.engine.merged
        assert merged is not None
        meter, measured = merged.meter, []

        def measure(slot: int) -> FoldCosts:
            measured.append(meter(slot))
            return FoldCosts(measured[0].pass_s, measured[0].row_s, 1e-9)

        merged.meter = measure
        for turn in range(3):
            driver.add(f"{turn}", *asked("main"), "main")
            while driver.engine.has_requests:
                driver.step()
                driver.engine.poll()
        status = driver.engine.stats(0).merged
    assert status is not None
    [costs] = measured
    assert costs.pass_s > 0
    assert costs.switch_s > 0
    assert status.adapter_id == id_of_main(world, tmp_path)
    assert status.num_folded == status.num_groups == 12
    assert status.kept_bytes > 0
    assert status.share == 1
    assert status.gain > 0


def id_of_main(world: World, state_dir: Path) -> int:
    registry = open_registry(EngineConfig(model=str(world[0]), state_dir=str(state_dir)))
    try:
        return registry.get("main").adapter_id
    finally:
        registry.close()


def test_off_there_is_nothing_of_it(world: World, tmp_path: Path) -> None:
    with serve(world, tmp_path, merged_mode="off") as driver:
        assert driver.engine.merged is None
        assert driver.engine.stats(0).merged is None
