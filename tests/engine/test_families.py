"""What families have beyond Llama's, through the engine: with adapters on the names that their checkpoints
have and on what lies around the projections, cold, chunked, side by side, and again from the prefix cache."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from tests.engine.driver import drive
from tests.engine.oracle import all_linear, make_kind, make_model, make_prompt, reference_tokens
from toppings.config import EngineConfig
from toppings.engine.base import open_registry

SAVED = {
    "gemma2": ["pre_feedforward_layernorm", "post_feedforward_layernorm", "norm", "embed_tokens"],
    "gemma3": ["post_attention_layernorm", "q_norm", "k_norm", "lm_head"],
    "phi3": ["input_layernorm", "lm_head"],
    "olmo2": ["post_attention_layernorm", "q_norm", "norm"],
    "granite": ["embed_tokens", "lm_head"],
    "smollm3": ["input_layernorm", "embed_tokens"],
    "qwen3_moe": ["post_attention_layernorm", "lm_head"],
    "mistral": ["input_layernorm", "embed_tokens", "lm_head"],
    "mixtral": ["norm", "lm_head"],
    "olmo3": ["post_feedforward_layernorm", "k_norm"],
    "gpt_oss": ["input_layernorm", "lm_head"],
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
    "saved": lambda family: LoraConfig(
        r=4, target_modules=["v_proj" if family != "phi3" else "down_proj"], modules_to_save=SAVED[family]
    ),
}


MODES = ["cpu_assisted", "pipelined", "cpu_shrink", "on_demand", "auto", "cached"]
NUM_TOKENS = 8


@dataclass(frozen=True)
class World:
    family: str
    model: Path
    adapters: dict[str, Path]
    prompts: dict[str, list[int]]

    def check(self, tokens: dict[str, list[int]], turn: str) -> None:
        for name, prompt in self.prompts.items():
            expected = reference_tokens(self.model, self.adapters[name], prompt, NUM_TOKENS)
            assert expected != reference_tokens(self.model, None, prompt, NUM_TOKENS), f"{name} has no effect"
            assert tokens[f"{name} {turn}"] == expected, name


@pytest.fixture(scope="module", params=SAVED)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    root, family = tmp_path_factory.mktemp(request.param), request.param
    model = make_model(root / "model", family)
    adapters = {
        name: make_kind(root / name, model, config(family), seed=i)
        for i, (name, config) in enumerate(KINDS.items())
    }
    return World(
        family, model, adapters, {name: make_prompt(i, 21 + 3 * i) for i, name in enumerate(adapters)}
    )


def mode_of(world: World, offset: int) -> str:
    """Families take turns: every mode has some."""
    return MODES[(list(SAVED).index(world.family) + offset) % len(MODES)]


def test_adapters_of_all_kinds_cold_mixed_chunked_and_cached_match_the_oracle(
    world: World, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "mode": mode_of(world, 0),
        "link_gbps": 0.05,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 8,
    }
    base = world.prompts["saved"]
    with drive(world.model, tmp_path / "state", world.adapters, **settings) as driver:
        for turn in ("cold", "cached"):
            for name, prompt in world.prompts.items():
                driver.add(f"{name} {turn}", prompt, NUM_TOKENS, name)
            driver.add(f"base {turn}", base, NUM_TOKENS)
            driver.run()
        tokens, cached = driver.tokens, driver.first["base cached"].num_cached_tokens
    assert (
        tokens["base cold"] == tokens["base cached"] == reference_tokens(world.model, None, base, NUM_TOKENS)
    )
    assert cached
    world.check(tokens, "cold")
    world.check(tokens, "cached")


def test_adapters_of_all_kinds_alone_chunked_preempted_evicted_and_reloaded_match_the_oracle(
    world: World, tmp_path: Path
) -> None:
    """Room for the first two adapters, and for fewer tokens than these two come to."""
    config = json.loads((world.model / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    page_bytes = 2 * 2 * config["num_key_value_heads"] * head_dim * 4 * config["num_hidden_layers"]
    engine = EngineConfig(model=str(world.model), state_dir=str(tmp_path / "state"), dtype="float32")
    with closing(open_registry(engine)) as registry:
        sizes = [registry.register(name, path).num_bytes for name, path in world.adapters.items()]
    mode = mode_of(world, 3)
    settings: dict[str, Any] = {
        "mode": "pipelined" if mode == "cached" else mode,  # which evicts nothing
        "link_gbps": 0.05,
        "max_num_batched_tokens": 7,
        "max_num_seqs": 4,
        "max_model_len": 48,
        "page_size": 2,
        "enable_prefix_caching": "off",
        "kv_cache_bytes": 25 * page_bytes,
        "device_pool_bytes": max(*sizes, sum(sizes[:2])),
        "host_store_bytes": 2 * max(sizes),
    }
    with drive(world.model, tmp_path / "state", {}, **settings) as driver:
        for name, prompt in world.prompts.items():
            driver.add(f"{name} mixed", prompt, NUM_TOKENS, name)
        driver.run()
        for name, prompt in world.prompts.items():
            driver.add(f"{name} alone", prompt, NUM_TOKENS, name)
            tokens = driver.run()
        counters = driver.engine.stats(0).counters
    assert counters["device_evictions"] > 0
    assert counters["preemptions"] > 0
    world.check(tokens, "mixed")
    world.check(tokens, "alone")
