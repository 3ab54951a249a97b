"""Odd adapters that PEFT loads and computes as plain LoRA: its own weights are the oracle."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.adapters.fixtures import HIDDEN, SHAPES, make_tensors, tiny_llama, write_adapter
from toppings.adapters.checkpoint import read_checkpoint
from toppings.adapters.checkpoint_plan import module_name
from toppings.adapters.packed import pack_weights
from toppings.core import MODULES

QV = ("q_proj", "v_proj")
VISUAL = r"^(?!.*visual)(?!.*lm_head).*(?:q|v)_proj$"


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}


def plus(*keys: str) -> dict[str, torch.Tensor]:
    return {**make_tensors(QV), **{key: torch.ones(4, HIDDEN) for key in keys}}


CASES: dict[str, dict[str, Any]] = {
    "rank pattern that matches nothing": {"rank_pattern": {"c_attn": 24}},
    "alpha pattern that is anchored": {"alpha_pattern": {"^q_proj": 100}},
    "alpha patterns, the first that matches counts": {"alpha_pattern": {"q_proj": 3, ".*q_proj": 100}},
    "alpha pattern with a wildcard": {"alpha_pattern": {"q.proj": 100, "1.self_attn.v_proj": 7}},
    "alpha pattern of alternatives": {"alpha_pattern": {r"layers\.(0|2)\..*(q|v)_proj": 50}},
    "negative lookahead": {"target_modules": VISUAL},
    "flags in the pattern": {"target_modules": r"(?i).*\.(Q|V)_PROJ"},
    "alternatives at the top": {"target_modules": r".*q_proj|.*v_proj"},
    "exclude by pattern": {"target_modules": "all-linear", "exclude_modules": r".*(?<!q|v)_proj"},
    "layers pattern with a group": {
        "layers_pattern": [r"(layers|h)"],
        "layers_to_transform": [0, 1, 2],
    },
    "exact path outside the chosen layers": {
        "target_modules": ["q_proj", *(f"model.layers.{i}.self_attn.v_proj" for i in range(3))],
        "layers_to_transform": [0, 1, 2],
    },
    "fan in, fan out": {"fan_in_fan_out": True},
    "bias of a base without any": {"bias": "all"},
    "bias of targets without any": {"bias": "lora_only"},
    "keys with PEFT's adapter name": {"tensors": renamed(make_tensors(QV))},
    "a base layer beside the LoRA": {"tensors": plus("base_model.model.lm_head.base_layer.weight")},
    "rotary buffers": {"tensors": plus("base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq")},
    "tensors of another program": {"tensors": plus("optimizer.state", "v_head.summary.weight")},
    "an old fine-tuner's fields": {"enable_lora": None, "merge_weights": False, "enable": [True, False]},
    "another fine-tuner's fields": {"swift_type": "LORA", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6},
    "a field of the future": {"some_bookkeeping": {"a": [1]}},
    "8 bit floats": {"tensors": {k: v.to(torch.float8_e4m3fn) for k, v in make_tensors(QV).items()}},
    "64 bit floats": {"tensors": {k: v.double() for k, v in make_tensors(QV).items()}},
    "no alpha and no rank": {"r": 8, "lora_alpha": 8, "tensors": make_tensors(QV, 8)},
    "negative alpha": {"lora_alpha": -8},
}
WARNED = {
    "fan in, fan out": "fan_in_fan_out",
    "another fine-tuner's fields": "swift_type",
    "a field of the future": "some_bookkeeping",
}


@pytest.fixture(scope="module")
def base() -> Any:
    torch.manual_seed(7)
    return tiny_llama().state_dict()


def load_with_peft(path: Path, state: dict[str, torch.Tensor]) -> tuple[Any, str]:
    model = tiny_llama()
    model.load_state_dict(state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(model, path)
    return loaded, " ".join(str(each.message) for each in caught)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_served_with_the_weights_that_peft_computes(
    tmp_path: Path, base: Any, case: str
) -> None:
    fields = {"tensors": make_tensors(QV), "target_modules": list(QV), **CASES[case]}
    write_adapter(tmp_path, **fields)
    model, told = load_with_peft(tmp_path, base)
    checkpoint = read_checkpoint(tmp_path, SHAPES)
    layout, blocks = pack_weights(checkpoint, "float32")
    modules = dict(model.base_model.model.named_modules())
    for index, layer in enumerate(layout.layers):
        start = layout.layer_offset_bytes(index) // 4
        for m in range(len(MODULES)):
            module = modules[module_name(index, m)]
            assert (layer.ranks[m] > 0) == hasattr(module, "lora_A")
            if layer.ranks[m]:
                (size_in, size_out), rank = SHAPES.sizes[m], layer.ranks[m]
                a = blocks[start + layer.a_offsets[m] :][: rank * size_in].view(rank, size_in)
                b = blocks[start + layer.b_offsets[m] :][: rank * size_out].view(rank, size_out)
                torch.testing.assert_close(b.T @ a, module.get_delta_weight("default"))
    own = {k.replace(".base_layer", ""): v for k, v in model.base_model.model.state_dict().items()}
    assert all(torch.equal(own[name], weight) for name, weight in base.items())
    if case in WARNED:
        assert WARNED[case] in told
        assert any(WARNED[case] in warning for warning in checkpoint.warnings)


def test_what_has_no_effect_is_told(tmp_path: Path) -> None:
    write_adapter(
        tmp_path, rank_pattern={"c_attn": 24}, alpha_pattern={"q_proj": 8, ".*q_proj": 3}, modules=("q_proj",)
    )
    told = " ".join(read_checkpoint(tmp_path, SHAPES).warnings)
    assert "rank_pattern key 'c_attn' has no effect" in told
    assert "alpha_pattern key '.*q_proj' has no effect" in told


def test_an_ignored_tensor_is_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, tensors=plus("base_model.model.lm_head.base_layer.weight"), modules=QV)
    assert any("lm_head.base_layer.weight" in w for w in read_checkpoint(tmp_path, SHAPES).warnings)
