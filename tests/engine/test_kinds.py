"""Every kind of adapter that PEFT saves and this engine serves: greedy tokens are PEFT's own, in fp32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig, VeraConfig

from tests.engine.driver import drive
from tests.engine.oracle import ALL_LINEAR, make_adapter, make_kind, make_model, make_prompt, reference_tokens

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
    with drive(model, tmp_path, adapters, mode=mode, link_gbps=0.05, max_num_batched_tokens=64) as driver:
        for name, prompt in prompts.items():
            driver.add(f"{name} alone", prompt, 8, name)
            driver.run()
        for name, prompt in prompts.items():
            driver.add(f"{name} mixed", prompt, 8, name)
        driver.add("base", make_prompt(0, 20), 8)
        tokens = driver.run()
    base = reference_tokens(model, None, make_prompt(0, 20), 8)
    assert tokens["base"] == base
    for name, prompt in prompts.items():
        expected = reference_tokens(model, adapters[name], prompt, 8)
        assert expected != reference_tokens(model, None, prompt, 8), f"{name} has no effect"
        assert tokens[f"{name} alone"] == expected, name
        assert tokens[f"{name} mixed"] == expected, name
