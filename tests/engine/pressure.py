"""What every kind of adapter is held to: the oracle's tokens, alone, among others, where room is scarce."""

from pathlib import Path
from typing import Any

from tests.engine.driver import drive
from tests.engine.oracle import make_prompt, reference_tokens

NUM_TOKENS = 8
Prompts = dict[str, list[int]]
"""By the adapter that each is for."""


def check_alone_and_mixed(
    model: Path, state_dir: Path, adapters: dict[str, Path], prompts: Prompts, mode: str
) -> None:
    """Cold, over a slow link; then all at once, beside the base model. Each adapter changes the tokens."""
    with drive(model, state_dir, adapters, mode=mode, link_gbps=0.05, max_num_batched_tokens=64) as driver:
        for name, prompt in prompts.items():
            driver.add(f"{name} alone", prompt, NUM_TOKENS, name)
            driver.run()
        driver.add_all(prompts, "mixed", NUM_TOKENS)
        driver.add("base", make_prompt(0, 20), NUM_TOKENS)
        tokens = driver.run()
        assert not driver.errors()
    assert tokens["base"] == reference_tokens(model, None, make_prompt(0, 20), NUM_TOKENS)
    for name, prompt in prompts.items():
        expected = reference_tokens(model, adapters[name], prompt, NUM_TOKENS)
        assert expected != reference_tokens(model, None, prompt, NUM_TOKENS), f"{name} has no effect"
        assert tokens[f"{name} alone"] == expected, name
        assert tokens[f"{name} mixed"] == expected, name


def check_under_pressure(
    model: Path,
    state_dir: Path,
    adapters: dict[str, Path],
    prompts: Prompts,
    *,
    num_tokens: int,
    head_dim: int,
    device_kib: int,
    host_kib: int,
    **settings: Any,
) -> None:
    """Chunked, preempted, evicted and reloaded, with room for a few adapters and a few hundred tokens."""
    page_bytes = 16 * 2 * 2 * head_dim * 4 * 3  # tokens · (k, v) · kv heads · head dim · fp32 · layers
    scarce = {
        "max_num_batched_tokens": 7,
        "max_num_seqs": 4,
        "max_model_len": 200,
        "kv_cache_bytes": 14 * page_bytes,
        "device_pool_bytes": device_kib * 1024,
        "host_store_bytes": host_kib * 1024,
    }
    with drive(model, state_dir, adapters, **scarce, **settings) as driver:
        for turn in ("first", "second"):
            driver.add_all(prompts, turn, num_tokens)
            tokens = driver.run()
        counters = driver.engine.stats(0).counters
    assert counters["device_evictions"] > 0
    assert counters["preemptions"] > 0
    for name, prompt in prompts.items():
        expected = reference_tokens(model, adapters[name], prompt, num_tokens)
        assert tokens[f"{name} first"] == tokens[f"{name} second"] == expected, name
