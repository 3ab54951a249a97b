"""Every kind of adapter that PEFT saves and this engine serves: greedy tokens are PEFT's own, in fp32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, VeraConfig

from tests.engine.driver import drive, hold_link
from tests.engine.oracle import (
    ALL_LINEAR,
    make_adapter,
    make_kind,
    make_model,
    make_prompt,
    random_peft,
    reference_tokens,
)
from tests.engine.pressure import check_alone_and_mixed, check_under_pressure
from toppings.engine import device_lora, own_layers

ALL = list(ALL_LINEAR)
KINDS: dict[str, Callable[[], Any]] = {
    "adalora": lambda: AdaLoraConfig(init_r=6, lora_alpha=9, target_modules=ALL, total_step=10),
    "vera": lambda: VeraConfig(r=16, target_modules=["q_proj", "o_proj"], d_initial=0.5),
    "loha": lambda: LoHaConfig(r=4, alpha=2, target_modules=ALL),
    "lokr": lambda: LoKrConfig(r=3, alpha=3, target_modules=ALL),
    "lokr-both": lambda: LoKrConfig(
        r=2, alpha=2, decompose_both=True, decompose_factor=8, target_modules=["q_proj", "down_proj"]
    ),
    "pissa": lambda: LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "up_proj"]),
    "olora": lambda: LoraConfig(
        r=5, lora_alpha=8, init_lora_weights="olora", target_modules=["v_proj", "down_proj"]
    ),
    "bias": lambda: LoraConfig(r=4, lora_alpha=6, lora_bias=True, target_modules=ALL),
    "dora": lambda: LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=ALL),
    "dora-qv": lambda: LoraConfig(
        r=16, use_dora=True, use_rslora=True, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2]
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A family whose projections have biases: DoRA leaves these out."""
    root = tmp_path_factory.mktemp("qwen2")
    model = make_model(root / "model", "qwen2")
    adapters = {
        name: make_kind(root / name, model, config(), seed=i)
        for i, (name, config) in enumerate(KINDS.items())
    }
    adapters["plain"] = make_adapter(root / "plain", model, rank=8)
    return model, adapters


@pytest.mark.parametrize("mode", ["on_demand", "pipelined", "cached", "cpu_assisted", "cpu_shrink", "auto"])
def test_every_kind_alone_and_mixed_with_all_others_matches_the_oracle(
    world: tuple[Path, dict[str, Path]], tmp_path: Path, mode: str
) -> None:
    model, adapters = world
    prompts = {name: make_prompt(i, 5 + 5 * i) for i, name in enumerate(adapters)}
    check_alone_and_mixed(model, tmp_path, adapters, prompts, mode)


def test_chunked_preempted_evicted_and_reloaded_they_give_the_same_tokens(
    world: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    model, adapters = world
    prompts = {name: make_prompt(i, 30) for i, name in enumerate(["dora", "bias", "loha", "pissa", "plain"])}
    room = {"head_dim": 16, "device_kib": 400, "host_kib": 600}
    check_under_pressure(model, tmp_path, adapters, prompts, num_tokens=30, **room)


def test_cpu_workers_compute_products_of_adapters_with_gains(
    world: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapters = world
    chosen, prompt = {"dora": adapters["dora"]}, make_prompt(3, 40)
    with drive(model, tmp_path, chosen, mode="cpu_assisted", link_gbps=0.002) as driver:
        hold_link(monkeypatch)
        driver.add("cold", prompt, 4, "dora")
        tokens = driver.run()
        assert driver.engine.stats(0).counters["assist_cpu_products"] > 0
    assert tokens["cold"] == reference_tokens(model, adapters["dora"], prompt, 4)


def test_a_batch_without_them_runs_nothing_of_theirs(
    world: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one operation more than before there were such kinds."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed for nobody")

    monkeypatch.setattr(device_lora, "adjust_columns_", refuse)
    monkeypatch.setattr(own_layers.OwnLayers, "__init__", refuse)
    model, adapters = world
    with drive(model, tmp_path, adapters) as driver:
        driver.add("plain", make_prompt(1, 20), 4, "plain")
        driver.add("base", make_prompt(1, 20), 4)
        tokens = driver.run()
        driver.add("dora", make_prompt(1, 20), 4, "dora")
        driver.run()
        assert "computed for nobody" in str(driver.errors()["dora"])
    assert tokens["plain"] == reference_tokens(model, adapters["plain"], make_prompt(1, 20), 4)


def test_what_training_has_pruned_of_adalora_is_left_out(
    world: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    model, _ = world
    config = AdaLoraConfig(init_r=6, lora_alpha=9, target_modules=["q_proj", "v_proj"], total_step=10)
    peft = random_peft(model, config, seed=4)
    kept = {"q_proj": [True, False, True, True, False, False], "v_proj": [False] * 6}
    peft.peft_config["default"].rank_pattern = {
        f"model.layers.{layer}.self_attn.{name}.lora_E": ranks
        for layer in range(3)
        for name, ranks in kept.items()
    }
    peft.save_pretrained(tmp_path / "pruned")
    prompt = make_prompt(8, 20)
    with drive(model, tmp_path / "state", {"pruned": tmp_path / "pruned"}) as driver:
        assert driver.registry.get("pruned").rank == 3
        assert driver.registry.get("pruned").targets == ("q_proj",)
        driver.add("pruned", prompt, 8, "pruned")
        tokens = driver.run()
    assert tokens["pruned"] == reference_tokens(model, tmp_path / "pruned", prompt, 8)
