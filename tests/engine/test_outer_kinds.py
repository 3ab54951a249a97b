"""What adapters have outside the projections, against PEFT: greedy tokens in fp32, log-probabilities of
prompts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional

from tests.engine.driver import drive
from tests.engine.oracle import (
    make_adapter,
    make_kind,
    make_model,
    make_prompt,
    reference_model,
)
from tests.engine.pressure import check_alone_and_mixed, check_under_pressure
from toppings.engine import scoring

TOKENS = list(range(5, 300, 3))
KINDS: dict[str, Callable[[], Any]] = {
    "head": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "lm_head"]),
    "embed": lambda: LoraConfig(r=5, lora_alpha=4, target_modules=["v_proj", "embed_tokens"]),
    "ends-alone": lambda: LoraConfig(r=3, use_rslora=True, target_modules=["embed_tokens", "lm_head"]),
    "dora-ends": lambda: LoraConfig(r=4, use_dora=True, target_modules=["o_proj", "embed_tokens", "lm_head"]),
    "bias-head": lambda: LoraConfig(r=4, lora_bias=True, target_modules=["down_proj", "lm_head"]),
    "saved": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"]
    ),
    "saved-embedding": lambda: LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["embed_tokens"]),
    "tokens": lambda: LoraConfig(r=4, target_modules=["up_proj"], trainable_token_indices=TOKENS),
}
MODELS: dict[str, dict[str, Any]] = {
    "head-norms": {"family": "qwen3"},
    "tied": {"family": "llama3-scaled"},
}
World = tuple[Path, dict[str, Path]]


@pytest.fixture(scope="module", params=MODELS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp(request.param)
    model = make_model(root / "model", **MODELS[request.param])
    adapters = {
        name: make_kind(root / name, model, config(), seed=i)
        for i, (name, config) in enumerate(KINDS.items())
    }
    adapters["plain"] = make_adapter(root / "plain", model, rank=8)
    return model, adapters


def prompts_of(adapters: dict[str, Path]) -> dict[str, list[int]]:
    return {name: make_prompt(i, 6 + 5 * i) for i, name in enumerate(adapters)}


@pytest.mark.parametrize("mode", ["on_demand", "pipelined", "cached", "cpu_assisted", "cpu_shrink", "auto"])
def test_every_kind_alone_and_mixed_with_all_others_matches_the_oracle(
    world: World, tmp_path: Path, mode: str
) -> None:
    model, adapters = world
    check_alone_and_mixed(model, tmp_path, adapters, prompts_of(adapters), mode)


def test_chunked_preempted_evicted_and_reloaded_they_give_the_same_tokens(
    world: World, tmp_path: Path
) -> None:
    model, adapters = world
    names = ["head", "embed", "saved", "dora-ends", "tokens", "plain"]
    prompts = {name: make_prompt(i, 30) for i, name in enumerate(names)}
    room = {"head_dim": 32 if "head-norms" in str(model) else 16, "device_kib": 320, "host_kib": 480}
    check_under_pressure(model, tmp_path, adapters, prompts, num_tokens=40, **room)


def test_prompts_are_scored_and_embedded_by_the_adapters_own_layers(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, whose rows are several adapters'; logits of a few rows at a time."""
    model, adapters = world
    monkeypatch.setattr(scoring, "CHUNK_LOGITS", 5 * 320)
    prompts = prompts_of(adapters)
    with drive(model, tmp_path, adapters, max_num_batched_tokens=24, max_num_seqs=4) as driver:
        for name, prompt in prompts.items():
            driver.add(f"score {name}", prompt, 2, name, prompt_logprobs=0)
            driver.add(f"embed {name}", prompt, 0, name, pooling="last")
        driver.run()
    for name, prompt in prompts.items():
        with torch.inference_mode():
            answer = reference_model(model, adapters[name])(
                input_ids=torch.tensor([prompt]), output_hidden_states=True
            )
        rows = answer.logits[0].log_softmax(-1)
        told = driver.first[f"score {name}"].prompt_logprobs
        assert told is not None
        ours = torch.tensor([each.logprob for each in told.tokens(prompt[1:])])
        expected = rows[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        torch.testing.assert_close(ours, expected, atol=5e-4, rtol=1e-4, msg=name)
        vector = torch.frombuffer(
            bytearray(driver.last[f"embed {name}"].embedding or b""), dtype=torch.float32
        )
        hidden = functional.normalize(answer.hidden_states[-1][0, -1], dim=0)
        torch.testing.assert_close(vector, hidden, atol=5e-4, rtol=1e-4, msg=name)


def test_in_bfloat16_they_round_as_a_plain_adapter_does(world: World, tmp_path: Path) -> None:
    """Mean error of the prompt's log-probabilities against fp32's, of each kind and of the base model."""
    model, adapters = world
    prompts: dict[str | None, list[int]] = {name: make_prompt(5, 60) for name in (None, *adapters)}
    with drive(model, tmp_path, adapters, dtype="bfloat16") as driver:
        for name, prompt in prompts.items():
            driver.add(str(name), prompt, 1, name, prompt_logprobs=0)
        driver.run()
    errors = {}
    for name, prompt in prompts.items():
        with torch.inference_mode():
            path = None if name is None else adapters[name]
            logits = reference_model(model, path)(input_ids=torch.tensor([prompt])).logits[0]
        told = driver.first[str(name)].prompt_logprobs
        assert told is not None
        ours = torch.tensor([each.logprob for each in told.tokens(prompt[1:])])
        expected = logits.log_softmax(-1)[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        errors[name] = ((ours - expected).abs().mean() / expected.std()).item()
    assert max(errors.values()) < 4 * max(errors[None], errors["plain"]), errors
