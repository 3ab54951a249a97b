"""A merge is served as PEFT serves it: greedy tokens in fp32, beside its parts, whatever became of these."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.engine.driver import drive
from tests.engine.oracle import make_adapter, make_model, make_prompt, reference_tokens
from toppings.adapters.merges import Merge, MergePart

WEIGHTS = {"one": 0.8, "two": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "cat": {},
    "linear": {},
    "ties": {"density": 0.6},
    "dare_linear": {"density": 0.7, "seed": 4},
    "dare_ties": {"density": 0.7, "seed": 5},
}
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("merges")
    model = make_model(root / "model")
    adapters = {
        "one": make_adapter(root / "one", model, rank=6, seed=1),
        "two": make_adapter(root / "two", model, rank=6, targets=("q_proj", "down_proj"), seed=2),
    }
    return model, adapters


def peft_tokens(
    world: tuple[Path, dict[str, Path]], prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[int]]:
    """Greedy ones of each method."""
    model_path, adapters = world
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapters["one"], adapter_name="one")
    model.load_adapter(adapters["two"], adapter_name="two")
    tokens = {}
    for method, options in METHODS.items():
        seed = options.get("seed", 0)
        monkeypatch.setattr("peft.tuners.lora.model._freeze_adapter", lambda *_, s=seed: torch.manual_seed(s))
        model.add_weighted_adapter(
            list(WEIGHTS), list(WEIGHTS.values()), method, method, density=options.get("density")
        )
        model.set_adapter(method)
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor([prompt]),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        tokens[method] = output[0, len(prompt) :].tolist()
    return tokens


def test_every_method_gives_the_tokens_that_peft_gives(
    world: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapters = world
    prompt = make_prompt(7, 24)
    with drive(model, tmp_path, adapters, mode="pipelined", link_gbps=0.05) as driver:
        for method, options in METHODS.items():
            parts = tuple(MergePart(*each) for each in WEIGHTS.items())
            driver.registry.merge(method, Merge(parts, method, **options))
        driver.add("ties alone", prompt, NUM_TOKENS, "ties")
        driver.run()
        for name in (*METHODS, *adapters):
            driver.add(name, prompt, NUM_TOKENS, name)
        tokens = driver.run()
    expected = peft_tokens(world, prompt, monkeypatch)
    assert {method: tokens[method] for method in METHODS} == expected
    assert tokens["ties alone"] == expected["ties"]
    base = reference_tokens(model, None, prompt, NUM_TOKENS)
    for name, path in adapters.items():
        assert tokens[name] == reference_tokens(model, path, prompt, NUM_TOKENS) != base
