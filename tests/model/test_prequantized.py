"""Checkpoints that are quantised already stand for exactly what their formats say."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.engine.driver import drive
from tests.engine.oracle import make_adapter, make_kind, make_model, make_prompt, reference_tokens
from toppings.config import EngineConfig
from toppings.engine.base import model_config
from toppings.engine.build import load_decoder
from toppings.model.config import ModelConfig
from toppings.model.decoder import Decoder
from toppings.model.weights import read_quantized, read_weights
from toppings.ops.linear import Linear, QuantizedLinear

GROUP = 32
WIDE = {"hidden_size": 128, "intermediate_size": 256}
Parts = dict[str, Tensor]


def words(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 [n, m / k] of codes [n, m]: code `order[i]` of each k goes to a word's i-th bits."""
    per_word = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_word))
    each = codes.view(len(codes), -1, per_word).long()
    packed = sum(each[:, :, (order or range(per_word))[i]] << bits * i for i in range(per_word))
    assert isinstance(packed, Tensor)
    return packed.where(packed < 2**31, packed - 2**32).int()


def grouped(weight: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [in, out], zeros and scales [groups, out], and what they stand for [out, in]."""
    torch.manual_seed(0)
    num_groups, num_out = int(groups.max()) + 1, weight.shape[0]
    scales = (weight.abs().max() / 7 * (0.5 + torch.rand(num_groups, num_out))).half()
    zeros = torch.randint(1, 16, (num_groups, num_out))
    codes = (weight.t() / scales.float()[groups] + zeros[groups]).round().clamp(0, 15).long()
    value = (codes - zeros[groups]).double() * scales.double()[groups]
    return codes, zeros, scales, value.t().float()


def gptq(
    weight: Tensor, *, shift: int = 1, seed: Callable[[Tensor], int] | None = None, group: int = GROUP
) -> tuple[Parts, Tensor]:
    groups = torch.arange(weight.shape[1]) // group
    if seed is not None:
        groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed(weight)))]
    codes, zeros, scales, value = grouped(weight, groups)
    parts = {"qweight": words(codes.t(), 4).t().contiguous(), "qzeros": words(zeros - shift, 4)}
    return {**parts, "scales": scales, "g_idx": groups.int(), "bias": torch.zeros(len(weight))}, value


def awq(weight: Tensor) -> tuple[Parts, Tensor]:
    codes, zeros, scales, value = grouped(weight, torch.arange(weight.shape[1]) // GROUP)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": words(codes, 4, order), "qzeros": words(zeros, 4, order), "scales": scales}, value


def compressed(weight: Tensor, *, bits: int, group: int, is_packed: bool = True) -> tuple[Parts, Tensor]:
    by_group = weight.view(len(weight), -1, group or weight.shape[1])
    largest = 2 ** (bits - 1) - 1
    scales = (by_group.abs().amax(2) / largest).bfloat16()
    codes = (by_group / scales.float()[:, :, None]).round().clamp(-largest - 1, largest)
    value = (codes.double() * scales.double()[:, :, None]).flatten(1).float()
    codes = codes.flatten(1).long()
    if not is_packed:
        return {"weight": codes.to(torch.int8), "weight_scale": scales}, value
    shape = torch.tensor(weight.shape)
    packed = words(codes + 2 ** (bits - 1), bits)
    return {"weight_packed": packed, "weight_scale": scales, "weight_shape": shape}, value


def described(bits: int, form: str) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True}
    groups = {"group_0": {"weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor], tuple[Parts, Tensor]]]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, gptq),
    "gptq-desc-act": ({"quant_method": "gptq", "bits": 4}, lambda w: gptq(w, seed=lambda w: 1)),
    "gptq-own-orders": ({"quant_method": "gptq", "bits": 4}, lambda w: gptq(w, seed=len)),
    "gptq-16": ({"quant_method": "gptq", "bits": 4}, lambda w: gptq(w, group=16)),
    "gptq-64": ({"quant_method": "gptq", "bits": 4}, lambda w: gptq(w, group=64)),
    "gptq-128": ({"quant_method": "gptq", "bits": 4}, lambda w: gptq(w, group=128)),
    "gptq-v2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        lambda w: gptq(w, shift=0),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, awq),
    "w4": (described(4, "pack-quantized"), lambda w: compressed(w, bits=4, group=GROUP)),
    "w4-rows": (described(4, "pack-quantized"), lambda w: compressed(w, bits=4, group=0)),
    "w8-grouped": (described(8, "pack-quantized"), lambda w: compressed(w, bits=8, group=GROUP)),
    "w8": (described(8, "pack-quantized"), lambda w: compressed(w, bits=8, group=0)),
    "int8": (described(8, "int-quantized"), lambda w: compressed(w, bits=8, group=0, is_packed=False)),
}


GROUPS = {
    **dict.fromkeys(("gptq", "gptq-desc-act", "gptq-v2", "awq", "w4"), ("qkv", "o", "gate_up", "down")),
    **dict.fromkeys(("gptq-64", "gptq-128", "w4-rows", "w8", "int8"), ("qkv", "o", "gate_up", "down")),
    "gptq-own-orders": ("o", "gate_up", "down"),  # q has more outputs than k and v, and so another order
    **dict.fromkeys(("gptq-16", "w8-grouped"), ()),
}
"""Projection groups that the forms for 8 and 4 bits hold."""
BYTES = {"gptq": 0.75, "awq": 0.75, "w4": 0.625, "gptq-128": 0.5625, "w4-rows": 0.5 + 4 / 128, "int8": 1.0}
"""Of an element; an int8 one's scale is its row's."""


def make(root: Path, case: str, family: str = "llama") -> tuple[Path, Path]:
    """A quantised checkpoint, and one with the values that it stands for."""
    config, pack = CASES[case]
    stored, reference = make_model(root / "stored", family, **WIDE), root / "reference"
    model = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    tensors = load_file(stored / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            base, weight = name.removesuffix(".weight"), tensors.pop(name)
            parts, parameter.data = pack(weight)
            own = {f"{base}.{part}": tensor.contiguous() for part, tensor in parts.items()}
            tensors = {**own, **tensors}  # a bias that the model has stays
    model.save_pretrained(reference)
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    fields = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps({**fields, "quantization_config": config}))
    return stored, reference


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_weights_are_exactly_those_that_the_codes_stand_for(case: str, family: str, tmp_path: Path) -> None:
    stored, reference = make(tmp_path, case, family)
    config, plain = ModelConfig.from_checkpoint(stored), ModelConfig.from_checkpoint(reference)
    weights = read_weights(stored, config, torch.float32)
    expected = read_weights(reference, plain, torch.float32)
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("case", list(CASES))
def test_the_forms_for_few_bits_hold_exactly_what_the_codes_stand_for(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored, reference = make(tmp_path, case, "qwen2")
    config, plain = ModelConfig.from_checkpoint(stored), ModelConfig.from_checkpoint(reference)
    with caplog.at_level(logging.INFO):
        kept = read_quantized(stored, config, torch.float32)
    assert kept.keys() == {f"layers.{i}.{group}.weight" for i in range(3) for group in GROUPS[case]}
    expected = read_weights(reference, plain, torch.float32)
    for name, weight in kept.items():
        assert torch.equal(weight.dequantized(), expected[name]), name
        num_bytes = BYTES.get(case, 0) * expected[name].numel()
        assert not num_bytes or 0 <= weight.nbytes - num_bytes <= 4 * weight.shape[0], name
    num_widened = 3 * (4 - len(GROUPS[case]))
    assert ("are served as the checkpoint has them" in caplog.text) == bool(kept)
    assert (f"{num_widened} of 12 weights" in caplog.text) == bool(num_widened)


@pytest.mark.parametrize("case", ["gptq-desc-act", "gptq-own-orders", "gptq-128", "awq", "w4", "int8"])
def test_tokens_are_those_of_peft_over_the_dequantized_base(case: str, tmp_path: Path) -> None:
    stored, reference = make(tmp_path, case)
    dora = LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"])
    adapters = {
        "a": make_adapter(tmp_path / "a", reference, rank=8, seed=1),
        "dora": make_kind(tmp_path / "dora", reference, dora),  # whose gain is the base weight's
    }
    prompts = {"base": make_prompt(3, 5), "a": make_prompt(4, 40), "dora": make_prompt(5, 9)}
    with drive(stored, tmp_path / "state", adapters, dtype="float32") as driver:
        for name, prompt in prompts.items():
            driver.add(name, prompt, 8, name if name in adapters else None)
        tokens = driver.run()
    for name, prompt in prompts.items():
        assert tokens[name] == reference_tokens(reference, adapters.get(name), prompt, 8), name


def test_with_quantization_what_is_quantised_already_stays_and_the_rest_follows(tmp_path: Path) -> None:
    stored, _ = make(tmp_path, "gptq-own-orders")

    def decoder(quantization: str) -> Decoder:
        config = EngineConfig(model=str(stored), quantization=quantization)
        return load_decoder(config, model_config(config))

    plain, int8 = decoder("none"), decoder("int8")
    assert isinstance(plain._lm_head, Linear)
    for linear, bits in ((int8._lm_head, 8), (int8._layers[0].projections["qkv"], 8)):
        assert isinstance(linear, QuantizedLinear)
        assert linear.weight.bits == bits
    down, same = (each._layers[0].projections["down"] for each in (plain, int8))
    assert isinstance(down, QuantizedLinear)
    assert isinstance(same, QuantizedLinear)
    assert torch.equal(down.weight.codes, same.weight.codes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quantized \(bitsandbytes\)"),
        ({"quant_method": "fp8"}, r"quantized \(fp8\)"),
        ("odd", r"quantized \(odd\)"),
        ({"quant_method": "gptq", "bits": 3}, "gptq with bits 3 is not read, only with 4"),
        ({"quant_method": "awq", "bits": 4, "version": "marlin"}, "awq of version 'marlin'"),
        ({**described(8, "float-quantized")}, "format 'float-quantized'"),
        ({**described(4, "pack-quantized"), "config_groups": {}}, "with 0 config_groups"),
        ({**described(4, "pack-quantized"), "config_groups": {"a": 1}}, "config_groups"),
    ],
)
def test_what_is_not_read_is_refused_by_name_with_what_would_do(
    config: object, message: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**fields, "quantization_config": config}))
    with pytest.raises(ValueError, match=rf"{message}.*--quantization int8"):
        model_config(EngineConfig(model=str(model)))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("scales", None, "lacks .* tensors, the first is .*weight"),
        ("qzeros", None, "qzeros is missing"),
        ("scales", lambda t: t[:-1], "scales of shape .* do not fit"),
        ("g_idx", lambda t: t + 100, "g_idx must name one of"),
    ],
)
def test_damaged_projections_are_refused_by_name(
    part: str, change: Callable[[Tensor], Tensor] | None, message: str, tmp_path: Path
) -> None:
    stored, _ = make(tmp_path, "gptq")
    tensors, name = load_file(stored / "model.safetensors"), f"model.layers.1.mlp.up_proj.{part}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        read_weights(stored, ModelConfig.from_checkpoint(stored), torch.float32)
