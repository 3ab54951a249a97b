"""Adapters with tokens that the base model has not, against PEFT over a base model with resized ends."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.engine.driver import drive
from tests.engine.oracle import (
    VOCAB_SIZE,
    make_adapter,
    make_kind,
    make_model,
    make_prompt,
    reference_model,
    reference_tokens,
)
from tests.engine.pressure import check_under_pressure
from toppings.adapters.errors import AdapterError
from toppings.core import FinishReason

NUM_ADDED = 5
NEW = list(range(VOCAB_SIZE, VOCAB_SIZE + NUM_ADDED))
ENDS = ["embed_tokens", "lm_head"]
KINDS: dict[str, Callable[[], Any]] = {
    "resized": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "saved": lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=ENDS),
    "tokens": lambda: LoraConfig(
        r=4, target_modules=["o_proj"], trainable_token_indices=dict.fromkeys(ENDS, NEW)
    ),
    "ends": lambda: LoraConfig(r=4, target_modules=["k_proj", *ENDS]),
    "dora-ends": lambda: LoraConfig(r=4, use_dora=True, target_modules=["up_proj", *ENDS]),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "bias": lambda: LoraConfig(r=4, lora_bias=True, target_modules=["v_proj"]),
    "head": lambda: LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
    "norms": lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]),
}
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"family": "qwen3"},
    "tied": {"family": "llama3-scaled"},
    "capped": {"family": "gemma2"},
}
MODES = ["on_demand", "pipelined", "cached", "cpu_assisted", "cpu_shrink", "auto"]
World = tuple[Path, dict[str, Path]]
Worlds = Callable[[str], World]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return cache(lambda name: make_world(tmp_path_factory.mktemp(name), name))


def make_world(root: Path, name: str) -> World:
    model = make_model(root / "model", **MODELS[name])
    kinds = [*((*each, NUM_ADDED) for each in KINDS.items()), *((*each, 0) for each in OTHERS.items())]
    adapters = {
        name: make_kind(root / name, model, config(), seed=i, num_added=num)
        for i, (name, config, num) in enumerate(kinds)
    }
    adapters["plain"] = make_adapter(root / "plain", model, rank=8)
    return model, adapters


def prompts_of(names: list[str]) -> dict[str, list[int]]:
    """With tokens of the adapter's own where it has any."""
    prompts = {name: make_prompt(i, 9 + 4 * i) for i, name in enumerate(names)}
    for name in KINDS.keys() & prompts:
        prompts[name][3:8:2] = NEW[:3]
    return prompts


def check_alone_and_mixed(world: World, tmp_path: Path, mode: str) -> None:
    model, adapters = world
    prompts = prompts_of(list(adapters))
    with drive(model, tmp_path, adapters, mode=mode, link_gbps=0.05, max_num_batched_tokens=64) as driver:
        for name in KINDS:
            driver.add(f"{name} alone", prompts[name], 12, name)
            driver.run()
        driver.add_all(prompts, "mixed", 12)
        driver.add("base", prompts["plain"], 12)
        tokens = driver.run()
    assert tokens["base"] == reference_tokens(model, None, prompts["plain"], 12)
    drawn = set[int]()
    for name, prompt in prompts.items():
        expected = reference_tokens(model, adapters[name], prompt, 12)
        assert tokens[f"{name} mixed"] == expected, name
        assert tokens.get(f"{name} alone", expected) == expected, name
        drawn |= set(expected)
    assert drawn & set(NEW), "no added token was drawn, which shows nothing"


@pytest.mark.parametrize("mode", MODES)
def test_cold_in_every_mode_alone_and_mixed_with_every_other_kind_they_match_the_oracle(
    worlds: Worlds, tmp_path: Path, mode: str
) -> None:
    check_alone_and_mixed(worlds("untied"), tmp_path, mode)


@pytest.mark.parametrize("name", ["tied", "capped"])
def test_of_other_families_they_match_the_oracle(worlds: Worlds, tmp_path: Path, name: str) -> None:
    """A cap would make a logit of what must not be drawn."""
    check_alone_and_mixed(worlds(name), tmp_path, "cpu_assisted")


@pytest.mark.parametrize("drafts", ["off", "ngram"])
def test_chunked_preempted_evicted_reloaded_and_drafted_they_give_the_same_tokens(
    worlds: Worlds, tmp_path: Path, drafts: str
) -> None:
    model, adapters = worlds("untied")
    prompts = {name: prompt * 2 for name, prompt in prompts_of([*KINDS, "dora", "plain"]).items()}
    room = {"head_dim": 32, "device_kib": 320, "host_kib": 480}
    check_under_pressure(model, tmp_path, adapters, prompts, num_tokens=40, **room, speculative_method=drafts)


def test_nobody_else_reads_or_draws_them(worlds: Worlds, tmp_path: Path) -> None:
    """Beside an adapter that has them: refused by name where they are given, neither drawn nor told
    as alternatives where everything is allowed."""
    model, adapters = worlds("untied")
    prompt = make_prompt(3, 12)
    with drive(model, tmp_path, adapters) as driver:
        driver.add("own", prompt, 30, "resized", logprobs=20, logit_bias=((NEW[0], 100.0),))
        for name, adapter in (("base", None), ("plain", "plain"), ("head", "head")):
            driver.add(f"draw {name}", prompt, 30, adapter, temperature=100.0, logprobs=20, seed=1)
            driver.add(f"prompt {name}", [*prompt, NEW[0]], 2, adapter)
            driver.add(f"bias {name}", prompt, 2, adapter, logit_bias=((NEW[0], 1.0),))
            driver.add(f"allowed {name}", prompt, 2, adapter, allowed_token_ids=(5, NEW[1]))
        driver.add("beyond", [*prompt, NEW[-1] + 1], 2, "resized")
        driver.add("only", prompt, 4, "resized", allowed_token_ids=(NEW[1], NEW[3]))
        driver.add("not first", prompt, 4, "resized", min_tokens=4, stop_token_ids=(NEW[1],))
        ended = FinishReason.ERROR
        tokens = driver.run()
        told = {name: driver.first[name].logprobs for name in ("own", "draw base", "draw head")}
    assert set(tokens["own"]) == {NEW[0]}
    assert set(tokens["only"]) <= {NEW[1], NEW[3]}
    for name in ("base", "plain", "head"):
        assert max(tokens[f"draw {name}"]) < VOCAB_SIZE
        for kind in ("prompt", "bias", "allowed"):
            last = driver.last[f"{kind} {name}"]
            assert last.finish_reason is ended
            assert f"token id {NEW[0 if kind != 'allowed' else 1]}; the vocabulary has ids 0 to 319" in str(
                last.error
            )
    assert "ids 0 to 324" in str(driver.last["beyond"].error)
    for each in told.values():
        assert each is not None
        assert all(torch.isfinite(torch.tensor(value)) for _, value in each[0].top)
    assert any(token in NEW for token, _ in (told["own"] or [])[0].top)


def test_prompts_with_them_are_scored_as_the_oracle_scores_them(worlds: Worlds, tmp_path: Path) -> None:
    """Beside a base model's prompt, whose rows have fewer tokens."""
    model, adapters = worlds("untied")
    prompts = dict[str | None, list[int]](prompts_of(list(KINDS)).items())
    prompts[None] = make_prompt(8, 20)
    with drive(model, tmp_path, adapters, max_num_batched_tokens=24, max_num_seqs=4) as driver:
        for name, prompt in prompts.items():
            driver.add(str(name), prompt, 1, name, prompt_logprobs=3)
        driver.run()
    for name, prompt in prompts.items():
        with torch.inference_mode():
            path = None if name is None else adapters[name]
            logits = reference_model(model, path)(input_ids=torch.tensor([prompt])).logits[0]
        rows = logits.log_softmax(-1)
        told = driver.first[str(name)].prompt_logprobs
        assert told is not None
        found = list(told.tokens(prompt[1:]))
        expected = rows[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        torch.testing.assert_close(
            torch.tensor([each.logprob for each in found]), expected, atol=5e-4, rtol=1e-4, msg=str(name)
        )
        best = rows[:-1].topk(3).indices.tolist()
        assert [[token for token, _ in each.top] for each in found] == best


@pytest.mark.parametrize(
    ("config", "rows", "reason"),
    [
        (
            LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),  # PEFT does not save the embedding's rows
            NUM_ADDED,
            "5 more than the base model, and no weights of model.embed_tokens",
        ),
        (LoraConfig(r=2, target_modules=["q_proj"]), -10, "has 310 rows; the base model has 320 tokens"),
        (
            LoraConfig(
                r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[NEW[0]]
            ),
            NUM_ADDED,
            "alora_invocation_tokens and tokens that the base model has not",
        ),
    ],
)
def test_a_vocabulary_that_cannot_be_served_is_refused(
    worlds: Worlds, tmp_path: Path, config: Any, rows: int, reason: str
) -> None:
    model, _ = worlds("untied")
    make_kind(tmp_path / "adapter", model, config, num_added=rows)
    with (
        drive(model, tmp_path / "state", {}) as driver,
        pytest.raises(AdapterError, match=reason),
    ):
        driver.registry.register("adapter", tmp_path / "adapter")


def test_a_minority_of_changed_rows_is_kept_as_rows(worlds: Worlds, tmp_path: Path) -> None:
    """A resized vocabulary costs what it adds, not a copy of all that the base model has."""
    model, adapters = worlds("untied")
    with drive(model, tmp_path, {name: adapters[name] for name in ("resized", "saved")}) as driver:
        layouts = {}
        for name in ("resized", "saved"):
            with driver.registry.open_packed(driver.registry.get(name).adapter_id) as packed:
                layouts[name] = packed.layout
    found = {name: dict(each.layers[0].extras + each.layers[-1].extras) for name, each in layouts.items()}
    assert found["resized"]["embed_tokens.rows"] == found["resized"]["lm_head.rows"] == (NUM_ADDED, 64)
    assert found["saved"]["embed_tokens.weight"] == (VOCAB_SIZE + NUM_ADDED, 64)
