"""Whatever the engine does with a request, its greedy tokens are those of transformers + PEFT in fp32."""

from pathlib import Path

import pytest

from tests.engine.driver import drive
from tests.engine.oracle import (
    ALL_LINEAR,
    FAMILIES,
    all_linear,
    make_adapter,
    make_model,
    make_prompt,
    reference_tokens,
)

ADAPTERS: dict[str, dict[str, object]] = {
    "all-r8": {"rank": 8},
    "qkv-r64": {"rank": 64, "targets": ("q_proj", "k_proj", "v_proj")},
    "qv-r1": {"rank": 1, "targets": ("q_proj", "v_proj"), "lora_alpha": 3},
    "o-down-r16": {"rank": 16, "targets": ("o_proj", "down_proj")},
    "mlp-r5-rslora": {"rank": 5, "targets": ("gate_proj", "up_proj", "down_proj"), "use_rslora": True},
    "patterned": {
        "rank": 8,
        "targets": ALL_LINEAR,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 24},
        "alpha_pattern": {"k_proj": 5, "up_proj": 40},
    },
    "one-layer": {"rank": 12, "targets": ("v_proj", "gate_proj"), "layers_to_transform": [1]},
    "kup-r256": {"rank": 256, "targets": ("k_proj", "up_proj"), "lora_alpha": 128},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("llama")
    model = make_model(root / "model")
    adapters = {
        name: make_adapter(root / name, model, seed=i, **kind)  # type: ignore[arg-type]
        for i, (name, kind) in enumerate(ADAPTERS.items())
    }
    return model, adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_matches_the_oracle_with_and_without_an_adapter(family: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", family)
    adapter = make_adapter(tmp_path / "adapter", model, rank=8, targets=all_linear(family))
    prompt = make_prompt(0, 37)
    with drive(model, tmp_path / "state", {"a": adapter}) as driver:
        driver.add("base", prompt, 20)
        driver.add("adapted", prompt, 20, "a")
        tokens = driver.run()
    assert tokens["base"] == reference_tokens(model, None, prompt, 20)
    assert tokens["adapted"] == reference_tokens(model, adapter, prompt, 20)
    assert tokens["base"] != tokens["adapted"]


@pytest.mark.parametrize("mode", ["on_demand", "pipelined", "cached", "cpu_assisted", "cpu_shrink", "auto"])
def test_every_adapter_kind_alone_and_in_one_mixed_batch_matches_the_oracle(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path, mode: str
) -> None:
    model, adapters = checkpoints
    prompts = {name: make_prompt(i, 5 + 7 * i) for i, name in enumerate(adapters)}
    with drive(model, tmp_path, adapters, mode=mode, link_gbps=0.05, max_num_batched_tokens=64) as driver:
        for name, prompt in prompts.items():
            driver.add(f"{name} alone", prompt, 12, name)
            driver.run()
        for name, prompt in prompts.items():
            driver.add(f"{name} mixed", prompt, 12, name)
            driver.add(f"{name} base", prompt, 12)
        tokens = driver.run()
    for name, prompt in prompts.items():
        expected = reference_tokens(model, adapters[name], prompt, 12)
        assert tokens[f"{name} alone"] == expected, name
        assert tokens[f"{name} mixed"] == expected, name
        assert tokens[f"{name} base"] == reference_tokens(model, None, prompt, 12)


@pytest.mark.parametrize("budget", [7, 64])
def test_a_chunked_prefill_gives_the_tokens_of_a_whole_one(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path, budget: int
) -> None:
    model, adapters = checkpoints
    names = ("all-r8", "qkv-r64", None)
    with drive(model, tmp_path, adapters, max_num_batched_tokens=budget, max_num_seqs=4) as driver:
        for i, name in enumerate(names):
            driver.add(str(name), make_prompt(i, 90 + i), 8, name)
        tokens = driver.run()
    for i, name in enumerate(names):
        path = adapters[name] if name else None
        assert tokens[str(name)] == reference_tokens(model, path, make_prompt(i, 90 + i), 8)


def test_tokens_stay_the_same_after_eviction_and_reload(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    model, adapters = checkpoints
    chosen = {name: adapters[name] for name in ("all-r8", "qkv-r64", "patterned")}
    prompt = make_prompt(1, 20)
    # Room for one of them at a time, on the device and (nearly) on the host.
    with drive(model, tmp_path, chosen, device_pool_bytes=400 * 1024, host_store_bytes=600 * 1024) as driver:
        for turn in range(3):
            for name in chosen:
                driver.add(f"{name} {turn}", prompt, 6, name)
                driver.run()
        stats = driver.engine.stats(0)
        tokens = driver.tokens
    assert stats.counters["device_evictions"] >= 3
    assert stats.device_bytes_used <= 400 * 1024
    assert stats.host_bytes_used <= 600 * 1024
    for name, path in chosen.items():
        expected = reference_tokens(model, path, prompt, 6)
        assert [tokens[f"{name} {turn}"] for turn in range(3)] == [expected] * 3


def test_tokens_stay_the_same_after_preemption(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    model, adapters = checkpoints
    names = ["all-r8", "qkv-r64", "patterned", None]
    page_bytes = 16 * 2 * 2 * 16 * 4 * 3  # tokens · (k, v) · kv heads · head dim · fp32 · layers
    with drive(model, tmp_path, adapters, kv_cache_bytes=14 * page_bytes, max_model_len=200) as driver:
        for i, name in enumerate(names):
            driver.add(str(name), make_prompt(i, 30), 50, name)
        tokens = driver.run()
        assert driver.engine.stats(0).counters["preemptions"] > 0
    for i, name in enumerate(names):
        path = adapters[name] if name else None
        assert tokens[str(name)] == reference_tokens(model, path, make_prompt(i, 30), 50)
