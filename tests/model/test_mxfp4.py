"""Experts in MXFP4 stand for exactly what transformers' own dequantisation makes of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.engine.driver import drive
from tests.engine.oracle import make_kind, make_model, make_prompt, reference_tokens
from toppings.model.config import ModelConfig
from toppings.model.decoder import Decoder
from toppings.model.weights import read_quantized, read_weights

PROJECTIONS = ("gate_up_proj", "down_proj")
QUANTIZATION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
Tensors = dict[str, Tensor]


def make(root: Path, change: Callable[[Tensors], Any] | None = None) -> tuple[Path, Path]:
    """A checkpoint with all sixteen values and scales of many sizes, perhaps changed, and a plain one with
    what transformers makes of it."""
    reference = make_model(root / "reference", "gpt_oss")
    plain, packed = load_file(reference / "model.safetensors"), Tensors()
    generator = torch.Generator().manual_seed(7)
    for name in [name for name in plain if name.endswith(PROJECTIONS)]:
        num, num_in, num_out = plain[name].shape
        blocks = torch.randint(256, (num, num_out, num_in // 32, 16), generator=generator).to(torch.uint8)
        scales = torch.randint(119, 125, blocks.shape[:-1], generator=generator).to(torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(plain, reference / "model.safetensors", {"format": "pt"})
    stored = root / "stored"
    stored.mkdir()
    tensors = packed | {name: tensor for name, tensor in plain.items() if not name.endswith(PROJECTIONS)}
    if change is not None:
        change(tensors)
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    fields = json.loads((reference / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps({**fields, "quantization_config": QUANTIZATION}))
    return stored, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_transformers_own_dequantisation(dtype: torch.dtype, tmp_path: Path) -> None:
    stored, reference = make(tmp_path)
    config, plain = ModelConfig.from_checkpoint(stored), ModelConfig.from_checkpoint(reference)
    assert not read_quantized(stored, config, dtype)
    weights, expected = read_weights(stored, config, dtype), read_weights(reference, plain, dtype)
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name
    exact = read_weights(reference, plain, torch.float32)
    name = "layers.0.experts.down.weight"
    assert torch.equal(weights[name].float(), exact[name]), "rounded"


def test_tokens_are_those_of_peft_over_the_dequantised_base(tmp_path: Path) -> None:
    stored, reference = make(tmp_path)
    both = ["experts.gate_up_proj", "experts.down_proj"]
    configs = {
        "experts": LoraConfig(r=4, target_modules=["q_proj"], target_parameters=both),
        "dora": LoraConfig(r=4, use_dora=True, target_modules=["k_proj", "o_proj"]),
    }
    adapters = {
        name: make_kind(tmp_path / name, reference, config, seed=i)
        for i, (name, config) in enumerate(configs.items())
    }
    prompts: dict[str | None, list[int]] = {
        name: make_prompt(i, 20) for i, name in enumerate((None, *adapters))
    }
    with drive(stored, tmp_path / "state", adapters, dtype="float32") as driver:
        for name, prompt in prompts.items():
            driver.add(str(name), prompt, 8, name)
        tokens = driver.run()
    for name, prompt in prompts.items():
        path = None if name is None else adapters[name]
        assert tokens[str(name)] == reference_tokens(reference, path, prompt, 8), name


FIRST = "model.layers.0.mlp.experts.down_proj"
DAMAGED: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no scales": (lambda t: t.pop(f"{FIRST}_scales"), "down_proj_scales is missing"),
    "no blocks": (lambda t: t.pop(f"{FIRST}_blocks"), f"lacks 1 tensors, the first is {FIRST}"),
    "other scales": (
        lambda t: t.update({f"{FIRST}_scales": t[f"{FIRST}_scales"][:, :-1].clone()}),
        "scales of shape .* do not fit",
    ),
    "floats": (
        lambda t: t.update({f"{FIRST}_scales": t[f"{FIRST}_scales"].float()}),
        "do not fit blocks .* as bytes",
    ),
    "fewer experts": (
        lambda t: t.update({f"{FIRST}_{part}": t[f"{FIRST}_{part}"][:-1] for part in ("blocks", "scales")}),
        r"has shape \[7, 160, 64\]; config.json says \[8, 160, 64\]",
    ),
    "a scale that is no number": (lambda t: t[f"{FIRST}_scales"][3].fill_(255), "scale of 255"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_projections_are_refused_by_name(case: str, tmp_path: Path) -> None:
    change, message = DAMAGED[case]
    stored, _ = make(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        Decoder.load(stored)
