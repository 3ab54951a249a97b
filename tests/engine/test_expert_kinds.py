"""Adapters of experts and routers, in every form that PEFT writes: greedy tokens are transformers' and PEFT's
own, in fp32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from tests.engine.driver import drive
from tests.engine.oracle import make_kind, make_model, make_prompt, reference_model, reference_tokens
from tests.engine.pressure import check_alone_and_mixed, check_under_pressure
from toppings.engine import expert_lora

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
ROUTERS = {"qwen3_moe": "gate.weight", "mixtral": "gate.weight", "gpt_oss": "router.weight"}
KINDS: dict[str, Callable[[str], Any]] = {
    "parameters": lambda _: LoraConfig(r=4, lora_alpha=6, target_modules=[], target_parameters=BOTH),
    "down": lambda _: LoraConfig(
        r=4,
        use_rslora=True,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.down_proj"],
        rank_pattern={"experts.down_proj": 3, r"layers\.1\.mlp\.experts\.down_proj": 5},
        alpha_pattern={r"layers\.2\.mlp\.experts\.down_proj": 20},
    ),
    "gate-up": lambda _: LoraConfig(
        r=2, target_modules=["v_proj"], target_parameters=["model.layers.1.mlp.experts.gate_up_proj"]
    ),
    "all-linear": lambda _: LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"),
    "router": lambda family: LoraConfig(r=3, target_modules=[], target_parameters=[ROUTERS[family]]),
    "plain": lambda _: LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "dora": lambda _: LoraConfig(r=4, use_dora=True, target_modules=["o_proj", "lm_head"]),
    "ends": lambda _: LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], modules_to_save=["norm"]),
}
NAMES = {
    "qwen3_moe": ("mlp.gate", "mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts.{}.", ("w1", "w3", "w2")),
}
"""Of families whose experts were modules of their own."""
World = tuple[Path, dict[str, Path]]


def make_by_module(
    path: Path, model: Path, family: str, *, seed: int, with_router: bool, **fields: Any
) -> Path:
    """An adapter as PEFT wrote it where every expert's projections are modules, which it still reads."""
    router, prefix, names = NAMES[family]
    base = reference_model(model, None)
    targets = ["q_proj", *names, *(["gate"] if with_router else [])]
    generator, rank = torch.Generator().manual_seed(seed), fields.setdefault("r", 4)
    tensors = {}
    for layer, block in enumerate(base.model.layers):
        (num_experts, hidden, size), q_size = (
            block.mlp.experts.down_proj.shape,
            block.self_attn.q_proj.out_features,
        )
        sizes = dict(zip(names, ((hidden, size), (hidden, size), (size, hidden)), strict=True))
        modules = {
            prefix.format(expert) + name: sizes[name] for expert in range(num_experts) for name in names
        } | {"self_attn.q_proj": (hidden, q_size)}
        if with_router:
            modules[router] = (hidden, num_experts)
        for name, (num_in, num_out) in modules.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            for half, shape in (("A", (rank, num_in)), ("B", (num_out, rank))):
                tensors[f"{key}.lora_{half}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        "lora_alpha": 6,
        **fields,
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


MODES = ("on_demand", "pipelined", "cached", "cpu_assisted", "cpu_shrink", "auto")
CASES = [
    *(("qwen3_moe", mode) for mode in MODES),
    ("mixtral", "auto"),
    ("gpt_oss", "auto"),
    ("gpt_oss", "cpu_assisted"),
]


@pytest.fixture(scope="module", params=ROUTERS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    family = request.param
    root = tmp_path_factory.mktemp(family)
    model = make_model(root / "model", family)
    adapters = {
        name: make_kind(root / name, model, config(family), seed=i)
        for i, (name, config) in enumerate(KINDS.items())
    }
    if family not in NAMES:
        return model, adapters
    adapters["modules"] = make_by_module(root / "modules", model, family, seed=1, with_router=False)
    adapters["all-modules"] = make_by_module(
        root / "all-modules", model, family, seed=2, with_router=True, r=3
    )
    return model, adapters


def prompts_of(adapters: dict[str, Path]) -> dict[str, list[int]]:
    return {name: make_prompt(i, 6 + 4 * i) for i, name in enumerate(adapters)}


@pytest.mark.parametrize(("world", "mode"), CASES, indirect=["world"])
def test_every_form_alone_and_mixed_with_all_other_kinds_matches_the_oracle(
    world: World, tmp_path: Path, mode: str
) -> None:
    model, adapters = world
    check_alone_and_mixed(model, tmp_path, adapters, prompts_of(adapters), mode)


@pytest.mark.parametrize(("world", "pool_kib"), [("qwen3_moe", 512), ("gpt_oss", 280)], indirect=["world"])
def test_chunked_preempted_evicted_and_reloaded_they_give_the_same_tokens(
    world: World, pool_kib: int, tmp_path: Path
) -> None:
    model, adapters = world
    prompts = {name: make_prompt(i, 30) for i, name in enumerate(adapters)}
    room = {"head_dim": 32, "device_kib": pool_kib, "host_kib": 700}
    check_under_pressure(model, tmp_path, adapters, prompts, num_tokens=40, **room)


@pytest.mark.parametrize("world", ROUTERS, indirect=True)
def test_in_bfloat16_they_round_as_a_plain_adapter_does(world: World, tmp_path: Path) -> None:
    """Error of the prompt's log-probabilities against fp32's, of each kind: of the median position, for where
    two experts are nearly equal, rounding decides which is taken. Then one token at a time."""
    model, adapters = world
    prompts: dict[str | None, list[int]] = {name: make_prompt(5, 60) for name in (None, *adapters)}
    with drive(model, tmp_path, adapters, dtype="bfloat16") as driver:
        for name, prompt in prompts.items():
            driver.add(str(name), prompt, 4, name, prompt_logprobs=0)
        driver.run()
        assert not driver.errors()
    errors = {}
    for name, prompt in prompts.items():
        with torch.inference_mode():
            path = None if name is None else adapters[name]
            logits = reference_model(model, path)(input_ids=torch.tensor([prompt])).logits[0]
        told = driver.first[str(name)].prompt_logprobs
        assert told is not None
        ours = torch.tensor([each.logprob for each in told.tokens(prompt[1:])])
        expected = logits.log_softmax(-1)[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])]
        errors[name] = ((ours - expected).abs().median() / expected.std()).item()
    assert max(errors.values()) < 4 * max(errors[None], errors["plain"]), errors


@pytest.mark.parametrize("world", ["qwen3_moe"], indirect=True)
def test_a_batch_without_them_runs_nothing_of_theirs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed for nobody")

    monkeypatch.setattr(expert_lora.StepExpertLora, "__init__", refuse)
    model, adapters = world
    with drive(model, tmp_path, adapters) as driver:
        driver.add("plain", make_prompt(1, 20), 4, "plain")
        tokens = driver.run()
        driver.add("down", make_prompt(1, 20), 4, "down")
        driver.run()
        assert "computed for nobody" in str(driver.errors()["down"])
    assert tokens["plain"] == reference_tokens(model, adapters["plain"], make_prompt(1, 20), 4)
