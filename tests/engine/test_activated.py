"""Activated LoRA: tokens are PEFT's, and what comes before the invocation is shared with the base model."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.driver import Driver, drive, hold_link
from tests.engine.oracle import make_adapter, make_model, make_prompt, reference_tokens

INVOCATION = [301, 302, 303]
ACTIVATED = {"alora_invocation_tokens": INVOCATION, "task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "activated": {"rank": 8, **ACTIVATED},
    "activated-qkv": {"rank": 16, "targets": ("q_proj", "k_proj", "v_proj"), **ACTIVATED},
    "plain": {"rank": 8},
}
COLD = {"device_pool_bytes": 170 * 1024, "host_store_bytes": 250 * 1024, "link_gbps": 0.01}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("activated")
    model = make_model(root / "model")
    adapters = {
        name: make_adapter(root / name, model, seed=i, **kind)
        for i, (name, kind) in enumerate(ADAPTERS.items())
    }
    return model, adapters


def prompts() -> dict[str, list[int]]:
    """With the invocation in all sorts of places."""
    text = [min(token, 300) for token in make_prompt(0, 80)]
    return {
        "in between": [*text[:37], *INVOCATION, *text[37:50]],
        "at the beginning": [*INVOCATION, *text[:20]],
        "at the end": [*text[:45], *INVOCATION],
        "twice": [*text[:20], *INVOCATION, *text[20:60], *INVOCATION, *text[60:62]],
        "twice in a page": [*text[:17], *INVOCATION, *text[17:21], *INVOCATION, *text[21:30]],
        "begun": [*text[:30], *INVOCATION[:2]],
        "never": text[:50],
    }


def check(
    driver: Driver, model: Path, adapters: dict[str, Path], round_: int, asked: dict[str, list[int]]
) -> None:
    for place, prompt in asked.items():
        for name in (*ADAPTERS, None):
            driver.add(f"{round_} {place} {name}", prompt, 8, name)
    driver.run()
    for place, prompt in asked.items():
        for name in (*ADAPTERS, None):
            expected = reference_tokens(model, adapters[name] if name else None, prompt, 8)
            assert driver.tokens[f"{round_} {place} {name}"] == expected, (place, name)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 24, "max_num_seqs": 8, "page_size": 4},
        {"async_scheduling": "on", "enable_prefix_caching": "off"},
    ],
    ids=["chunked", "ahead without cache"],
)
def test_tokens_are_those_of_peft(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path, settings: dict[str, Any]
) -> None:
    model, adapters = checkpoints
    with drive(model, tmp_path, adapters, **settings) as driver:
        for round_ in range(2):
            check(driver, model, adapters, round_, prompts())


def test_workers_compute_what_comes_behind_the_invocation(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapters = checkpoints
    asked = {place: prompts()[place] for place in ("in between", "twice in a page")}
    with drive(model, tmp_path, adapters, mode="cpu_assisted", **COLD) as driver:
        hold_link(monkeypatch)
        check(driver, model, adapters, 0, asked)
        assert driver.engine.stats(0).counters["assist_cpu_products"] > 0


def test_the_oracle_tells_where_an_adapter_acts(checkpoints: tuple[Path, dict[str, Path]]) -> None:
    model, adapters = checkpoints
    found = {
        place: reference_tokens(model, adapters["activated"], prompt, 8)
        != reference_tokens(model, None, prompt, 8)
        for place, prompt in prompts().items()
    }
    assert found == {place: place not in ("begun", "never") for place in found}


def test_a_chain_of_base_adapter_base_computes_its_context_once(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    model, adapters = checkpoints
    context = [min(token, 300) for token in make_prompt(1, 100)]
    cached: dict[str, int] = {}
    with drive(model, tmp_path, adapters, page_size=4) as driver:

        def ask(turn: str, prompt: list[int], adapter: str | None) -> list[int]:
            driver.add(turn, prompt, 8, adapter)
            tokens = driver.run()[turn]
            assert tokens == reference_tokens(model, adapters[adapter] if adapter else None, prompt, 8), turn
            cached[turn] = driver.first[turn].num_cached_tokens or 0
            return tokens

        answer = ask("base", context, None)
        judged = [*context, *answer, *INVOCATION]
        for name in ("activated", "activated-qkv"):
            verdict = ask(name, judged, name)
            ask(f"{name} again", judged, name)
        ask("plain", judged, "plain")
        ask("base again", [*context, *answer, *INVOCATION, *verdict], None)
        pages = driver.engine.scheduler.pages
        num_blocks = pages.num_blocks
        for name in ("activated", "activated-qkv"):
            adapter_id = driver.registry.get(name).adapter_id
            driver.engine.adapters.request_removal(adapter_id)
            assert driver.engine.is_removed(adapter_id)
        assert num_blocks > pages.num_blocks > 25
        driver.engine.check_integrity()
    assert cached["base"] == cached["plain"] == 0
    assert cached["activated"] == 107  # all that the base model has computed
    assert cached["activated-qkv"] == cached["activated again"] == 108  # of 111, up to the invocation
    assert cached["base again"] == 108
