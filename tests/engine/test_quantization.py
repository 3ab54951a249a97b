"""An engine with a quantised base, against transformers and PEFT on what its weights stand for."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.driver import drive
from tests.engine.oracle import make_adapter, make_model, make_prompt, reference_tokens
from toppings.config import ConfigError, EngineConfig
from toppings.engine.base import model_config
from toppings.engine.build import load_decoder
from toppings.ops.linear import QuantizedLinear
from toppings.ops.quantized import BITS, quantize

NUM_TOKENS = 12
LENGTHS = {"base": 5, "a": 40, "b": 70}  # rows of a prompt: fewer and more than are streamed


def dequantized(path: Path, model_path: Path, quantization: str) -> Path:
    """The checkpoint with the values that a quantised engine computes with, by transformers' own names."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    bits = BITS[quantization]
    assert bits is not None
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.data = quantize(parameter.data, bits).dequantized()
    head = quantize(model.get_output_embeddings().weight.data, 8).dequantized()
    model.lm_head.weight = torch.nn.Parameter(head)
    model.config.tie_word_embeddings = False
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("quantization", "family", "mode"),
    [
        ("int8", "llama3-scaled", "auto"),  # whose output layer is tied
        ("int8", "qwen2", "cpu_assisted"),
        ("int4", "llama", "pipelined"),
        ("int4", "qwen3", "on_demand"),
    ],
)
def test_tokens_are_those_of_peft_over_the_dequantized_base(
    quantization: str, family: str, mode: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", family)
    reference = dequantized(tmp_path / "reference", model, quantization)
    adapters = {
        name: make_adapter(tmp_path / name, model, rank=rank, seed=rank)
        for name, rank in (("a", 4), ("b", 16))
    }
    prompts = {name: make_prompt(length, length) for name, length in LENGTHS.items()}
    with drive(model, tmp_path / "state", adapters, quantization=quantization, mode=mode) as driver:
        for name, prompt in prompts.items():
            driver.add(name, prompt, NUM_TOKENS, name if name in adapters else None)
        tokens = driver.run()
    for name, prompt in prompts.items():
        assert tokens[name] == reference_tokens(reference, adapters.get(name), prompt, NUM_TOKENS), name


def test_dummy_weights_are_quantized_too(tmp_path: Path) -> None:
    config = EngineConfig(model=str(make_model(tmp_path / "model")), load_format="dummy", quantization="int4")
    linear = load_decoder(config, model_config(config))._layers[0].projections["qkv"]
    assert isinstance(linear, QuantizedLinear)
    assert linear.weight.codes.dtype == torch.uint8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "quantization int8 is for CPUs; use none"),
        ({"tensor_parallel_size": 2}, "split"),
        ({"quantization": "int3"}, "choose one of none, int8, int4"),
    ],
)
def test_what_cannot_be_served_is_refused_as_it_is_set(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_settings({"quantization": "int8", **settings})
