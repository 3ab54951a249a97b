"""The parts of a model are the model."""

from pathlib import Path

import pytest
import torch

from tests.engine.oracle import make_model
from toppings.core import MODULES
from toppings.model.config import ModelConfig
from toppings.model.named import named_config
from toppings.model.parts import split_model
from toppings.model.weights import read_weights

GROUP_MODULES = {"qkv": MODULES[:3], "o": MODULES[3:4], "gate_up": MODULES[4:6], "down": MODULES[6:]}


def modules_of(weights: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Each projection's weight in layer 0."""
    sizes = dict(zip(MODULES, config.base_shapes()[1]))
    found: dict[str, torch.Tensor] = {}
    for group, modules in GROUP_MODULES.items():
        pieces = torch.split(weights[f"layers.0.{group}.weight"], [sizes[module][1] for module in modules])
        found.update(zip(modules, pieces))
    return found


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize(("num_parts", "num_kv_heads"), [(2, 2), (4, 2), (4, 4), (2, 1)])
def test_the_parts_of_every_projection_make_the_whole(
    tmp_path: Path, num_parts: int, num_kv_heads: int, family: str
) -> None:
    """Phi-3's checkpoints have some of them as one."""
    path = make_model(tmp_path / "model", family, num_key_value_heads=num_kv_heads)
    config = ModelConfig.from_checkpoint(path)
    whole = modules_of(read_weights(path, config, torch.float32), config)
    rebuilt = {module: torch.full_like(weight, torch.nan) for module, weight in whole.items()}
    for part in split_model(config, num_parts):
        own = modules_of(read_weights(path, config, torch.float32, part), part.config)
        for module, (inputs, outputs) in zip(MODULES, part.slices):
            rebuilt[module][outputs, inputs] = own[module]
            assert own[module].numel() <= whole[module].numel() / min(num_parts, num_kv_heads)
    assert all(torch.equal(rebuilt[module], weight) for module, weight in whole.items())


def test_each_query_head_is_beside_its_key_value_head() -> None:
    config = named_config("llama-3.1-8b")  # 32 heads, 8 of keys and values
    for part in split_model(config, 16):
        (_, q), (_, k) = part.slices[:2]
        assert q.start // (4 * config.head_dim) == k.start // config.head_dim
        assert (part.config.num_heads, part.config.num_kv_heads) == (2, 1)


@pytest.mark.parametrize(
    ("num_parts", "problem"),
    [(3, "32 attention heads"), (32, "an intermediate size of 14352; choose one of 1, 2, 4, 8, 16$")],
)
def test_what_cannot_be_split_is_named(num_parts: int, problem: str) -> None:
    config = named_config("llama-3.1-8b", intermediate_size=14352 if num_parts == 32 else 14336)
    with pytest.raises(ValueError, match=f"tensor_parallel_size is {num_parts}, but the model has {problem}"):
        split_model(config, num_parts)


@pytest.mark.parametrize(
    ("family", "problem"),
    [
        ("olmo2", "norms over all queries"),
        ("mixtral", "experts, which are not split"),
        ("gpt_oss", "experts, which are not split"),
    ],
)
def test_what_is_not_split_yet_is_named(family: str, problem: str, tmp_path: Path) -> None:
    config = ModelConfig.from_checkpoint(make_model(tmp_path / "model", family))
    with pytest.raises(ValueError, match=rf"has {problem}.*choose one of 1$"):
        split_model(config, 2)


def test_key_value_heads_that_neither_divide_nor_are_divided_are_refused() -> None:
    shape = {"hidden_size": 6144, "num_attention_heads": 48, "num_key_value_heads": 16}
    with pytest.raises(ValueError, match="16 key-value heads"):
        split_model(named_config("llama-3.1-8b", **shape), 24)
