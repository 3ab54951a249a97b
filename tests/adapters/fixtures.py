"""PEFT checkpoints for tests: real ones from peft over a tiny random Llama, and handmade ones."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from toppings.adapters.checkpoint_plan import module_name
from toppings.adapters.layout import BaseShapes
from toppings.adapters.registry import AdapterRegistry
from toppings.core import MODULES

NUM_LAYERS, HIDDEN, KV, INTERMEDIATE = 3, 32, 16, 48
SHAPES = BaseShapes(
    NUM_LAYERS,
    (
        *((HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN)),
        *((HIDDEN, INTERMEDIATE), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)),
    ),
)


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # slow to import

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def make_peft(path: Path, *, seed: int = 0, **config: Any) -> Any:
    """Saves a random adapter made by peft itself; returns the peft model."""
    import peft  # slow to import

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(init_lora_weights=False, **settings))
    model.save_pretrained(path)
    return model


def tensor_key(layer: int, module: str, half: str) -> str:
    return f"base_model.model.{module_name(layer, MODULES.index(module))}.lora_{half}.weight"


def make_tensors(
    modules: tuple[str, ...] = ("q_proj",), rank: int = 4, *, shapes: BaseShapes = SHAPES, seed: int = 0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(shapes.num_layers):
        for name in modules:
            size_in, size_out = shapes.sizes[MODULES.index(name)]
            tensors[tensor_key(layer, name, "A")] = torch.randn(rank, size_in, generator=generator)
            tensors[tensor_key(layer, name, "B")] = torch.randn(size_out, rank, generator=generator)
    return tensors


def write_adapter(
    path: Path,
    *,
    rank: int = 4,
    modules: tuple[str, ...] = ("q_proj",),
    seed: int = 0,
    tensors: dict[str, torch.Tensor] | None = None,
    shapes: BaseShapes = SHAPES,
    **config: Any,
) -> Path:
    """A handmade checkpoint; `config` overrides the configuration, `tensors` the weights."""
    path.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(modules), **config}
    (path / "adapter_config.json").write_text(json.dumps(fields))
    tensors = make_tensors(modules, rank, shapes=shapes, seed=seed) if tensors is None else tensors
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    return path


def open_registry(state_dir: Path, *, dtype: str = "float32", shapes: BaseShapes = SHAPES) -> AdapterRegistry:
    return AdapterRegistry(state_dir, "tiny", shapes, dtype)
