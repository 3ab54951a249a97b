import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.checkpoints import LLAMA3_ROPE, LONG_ROPE, SHAPE, build, save
from toppings.model.config import ModelConfig


def write(path: Path, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def llama(path: Path, **changes: Any) -> Path:
    return write(path, **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SHAPE, **changes})


def test_old_and_new_spelling_of_rope_settings_mean_the_same(tmp_path: Path) -> None:
    new = llama(tmp_path / "new", rope_parameters=LLAMA3_ROPE)
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = llama(tmp_path / "old", rope_theta=LLAMA3_ROPE["rope_theta"], rope_scaling=scaling)
    plain = llama(tmp_path / "plain")
    assert ModelConfig.from_checkpoint(old) == ModelConfig.from_checkpoint(new)
    assert ModelConfig.from_checkpoint(old) != ModelConfig.from_checkpoint(plain)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}, 256),
        (LLAMA3_ROPE, 128),
        (LONG_ROPE, 40),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_positions_reach_as_far_as_the_frequencies(
    rope: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    path = llama(tmp_path, rope_parameters={"rope_theta": 10000.0, **rope})
    assert ModelConfig.from_checkpoint(path).max_position_embeddings == expected


def test_long_sequences_have_the_other_frequencies_of_longrope(tmp_path: Path) -> None:
    config = ModelConfig.from_checkpoint(
        llama(tmp_path, rope_parameters={"rope_theta": 10000.0, **LONG_ROPE})
    )
    longer = config.for_length(41)
    assert config.for_length(40) == config
    assert longer.max_position_embeddings == 128
    assert longer.ropes.tables[0].frequencies[-1] < config.ropes.tables[0].frequencies[-1]
    assert longer.ropes.tables[0].scaling == config.ropes.tables[0].scaling


def test_sizes_and_offsets_follow_the_module_order(tmp_path: Path) -> None:
    config = ModelConfig.from_checkpoint(llama(tmp_path, head_dim=24))
    q, kv = (64, 96), (64, 48)
    assert config.base_shapes() == (3, (q, kv, kv, (96, 64), (64, 112), (64, 112), (112, 64)))
    assert config.group_out_offsets() == {"qkv": (0, 96, 144), "o": (0,), "gate_up": (0, 112), "down": (0,)}


def test_end_tokens_come_from_the_generation_configuration_first(tmp_path: Path) -> None:
    path = llama(tmp_path, eos_token_id=5, bos_token_id=1)
    assert ModelConfig.from_checkpoint(path).eos_token_ids == (5,)
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    config = ModelConfig.from_checkpoint(path)
    assert (config.eos_token_ids, config.bos_token_id) == ((7, 9), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_the_checkpoints(dtype: torch.dtype, tmp_path: Path) -> None:
    config = ModelConfig.from_checkpoint(save(build("llama", dtype), tmp_path))
    assert getattr(torch, config.dtype) is dtype


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel'.*supported: LlamaForCausalLM, Mistral"),
        ({"architectures": None}, "architecture None"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized .bitsandbytes"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}},
            "rope_type is 'proportional'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ({"dtype": "float64"}, "float64"),
        ({"hidden_size": "big"}, "config.json is not valid"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_served_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_checkpoint(llama(tmp_path, **changes))


def test_a_directory_without_configuration_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a Hugging Face checkpoint.*config\.json"):
        ModelConfig.from_checkpoint(tmp_path)


def test_a_configuration_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        ModelConfig.from_checkpoint(tmp_path)
