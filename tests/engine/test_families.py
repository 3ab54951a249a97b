"""What families have beyond Llama's, through the engine: with adapters on the names that their checkpoints
have and on what lies around the projections, cold, chunked, side by side, and again from the prefix cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from tests.engine.driver import drive
from tests.engine.oracle import all_linear, make_kind, make_model, make_prompt, reference_tokens

SAVED = {
    "gemma2": ["pre_feedforward_layernorm", "post_feedforward_layernorm", "norm", "embed_tokens"],
    "gemma3": ["post_attention_layernorm", "q_norm", "k_norm", "lm_head"],
    "phi3": ["input_layernorm", "lm_head"],
    "olmo2": ["post_attention_layernorm", "q_norm", "norm"],
    "granite": ["embed_tokens", "lm_head"],
    "smollm3": ["input_layernorm", "embed_tokens"],
}
KINDS: dict[str, Callable[[str], Any]] = {
    "linear": lambda family: LoraConfig(r=8, target_modules=list(all_linear(family))),
    "dora": lambda family: LoraConfig(r=3, use_dora=True, target_modules=list(all_linear(family))),
    "first": lambda family: LoraConfig(r=4, use_rslora=True, target_modules=[all_linear(family)[0]]),
    "ends": lambda family: LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "dora-embedding": lambda family: LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens"]),
    "tokens": lambda family: LoraConfig(
        r=4, target_modules=["o_proj"], trainable_token_indices=list(range(5, 300, 3))
    ),
    "saved": lambda family: LoraConfig(r=4, target_modules=["down_proj"], modules_to_save=SAVED[family]),
}


@pytest.mark.parametrize("family", SAVED)
def test_adapters_of_all_kinds_cold_mixed_chunked_and_cached_match_the_oracle(
    family: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", family)
    adapters = {
        name: make_kind(tmp_path / name, model, config(family), seed=i)
        for i, (name, config) in enumerate(KINDS.items())
    }
    prompts = {name: make_prompt(i, 21 + 6 * i) for i, name in enumerate(adapters)}
    settings: dict[str, Any] = {
        "mode": "cpu_assisted",
        "link_gbps": 0.05,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 8,
    }
    with drive(model, tmp_path / "state", adapters, **settings) as driver:
        for turn in ("cold", "cached"):
            for name, prompt in prompts.items():
                driver.add(f"{name} {turn}", prompt, 8, name)
            driver.add(f"base {turn}", prompts["saved"], 8)
            driver.run()
        tokens, cached = driver.tokens, driver.first["base cached"].num_cached_tokens
    expected = reference_tokens(model, None, prompts["saved"], 8)
    assert tokens["base cold"] == tokens["base cached"] == expected
    assert cached
    for name, prompt in prompts.items():
        expected = reference_tokens(model, adapters[name], prompt, 8)
        assert expected != reference_tokens(model, None, prompt, 8), f"{name} has no effect"
        assert tokens[f"{name} cold"] == expected, name
        assert tokens[f"{name} cached"] == expected, name
