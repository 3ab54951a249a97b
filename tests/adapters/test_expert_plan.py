"""What an adapter has on experts and routers: read as PEFT reads it, and refused by name where it cannot
be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.adapters.fixtures import open_registry
from toppings.adapters.checkpoint import AdapterCheckpoint, read_checkpoint
from toppings.adapters.errors import AdapterError
from toppings.adapters.layout import BaseShapes
from toppings.adapters.merges import Merge, MergePart
from toppings.adapters.packed import pack_weights
from toppings.core import ExpertNames, Mixture
from toppings.model.families import STACKED_EXPERTS

HIDDEN, SIZE, NUM_EXPERTS = 16, 8, 3
SIZES = (*((HIDDEN, HIDDEN),) * 4, *((HIDDEN, SIZE),) * 2, (SIZE, HIDDEN))
SHAPES = BaseShapes(2, SIZES, mixture=Mixture(NUM_EXPERTS, 2, ExpertNames()))
STACKED = BaseShapes(2, SIZES, mixture=Mixture(NUM_EXPERTS, 2, STACKED_EXPERTS))
DENSE = BaseShapes(2, SIZES)
PREFIX = "base_model.model.model.layers."
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
Tensors = dict[str, torch.Tensor]


def pair(key: str, num_in: int, num_out: int, rank: int) -> Tensors:
    return {
        f"{key}.lora_A.weight": torch.randn(rank, num_in),
        f"{key}.lora_B.weight": torch.randn(num_out, rank),
    }


def of_modules(rank_of: dict[tuple[int, str], int]) -> Tensors:
    """The first layer's, of (expert, projection)."""
    tensors: Tensors = {}
    for (expert, name), rank in rank_of.items():
        sizes = (SIZE, HIDDEN) if name == "down_proj" else (HIDDEN, SIZE)
        tensors |= pair(f"{PREFIX}0.mlp.experts.{expert}.{name}", *sizes, rank)
    return tensors


def of_parameters(rank: int = 2) -> Tensors:
    tensors: Tensors = {}
    for layer in range(2):
        key = f"{PREFIX}{layer}.mlp.experts"
        tensors |= pair(f"{key}.base_layer", HIDDEN, 2 * SIZE, rank * NUM_EXPERTS)
        tensors |= pair(key, SIZE, HIDDEN, rank * NUM_EXPERTS)
    return tensors


def write(path: Path, tensors: Tensors, **config: Any) -> Path:
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": []}
    (path / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def read(path: Path, shapes: BaseShapes = SHAPES) -> AdapterCheckpoint:
    return read_checkpoint(path, shapes)


def test_experts_of_different_ranks_lie_below_each_other_filled_up_with_zeros(tmp_path: Path) -> None:
    ranks = {(0, "down_proj"): 2, (1, "down_proj"): 5, (2, "down_proj"): 1}
    tensors = of_modules(ranks)
    patterns = {r"experts\.1\.down_proj": 5, r"experts\.2\.down_proj": 1}
    write(
        tmp_path,
        tensors,
        target_modules=r".*layers\.0\.mlp\.experts\.\d\.down_proj",
        rank_pattern=patterns,
        alpha_pattern={r"experts\.2\.down_proj": 7},
        use_rslora=True,
    )
    found = read(tmp_path).outer
    assert list(found) == [0]
    a, b = found[0]["experts.down_proj.A"], found[0]["experts.down_proj.B"]
    assert (a.shape, b.shape) == ((NUM_EXPERTS, 5, SIZE), (NUM_EXPERTS, 5, HIDDEN))
    for (expert, name), rank in ranks.items():
        key = f"{PREFIX}0.mlp.experts.{expert}.{name}"
        own_a, own_b = (tensors[f"{key}.lora_{half}.weight"] for half in "AB")
        scale = (7 if expert == 2 else 3) / rank**0.5
        torch.testing.assert_close(b[expert].T @ a[expert], scale * own_b @ own_a)
        assert not a[expert, rank:].any()


def test_they_are_counted_named_and_packed_with_the_layers_they_belong_to(tmp_path: Path) -> None:
    write(tmp_path, of_parameters(), target_parameters=BOTH)
    checkpoint = read(tmp_path)
    layout, blocks = pack_weights(checkpoint, "float32")
    assert layout.has_experts
    assert not layout.has_outer
    assert (
        layout.outer_ranks == checkpoint.outer_ranks() == {"experts.gate_up_proj": 2, "experts.down_proj": 2}
    )
    numel = NUM_EXPERTS * 2 * (HIDDEN + 2 * SIZE + SIZE + HIDDEN)
    assert [layout.layer_bytes(layer) for layer in range(2)] == [numel * 4] * 2
    start, shape = layout.layers[1].find_extra("experts.down_proj.B") or (0, ())
    start += layout.layer_offset_bytes(1) // 4
    torch.testing.assert_close(
        blocks[start : start + NUM_EXPERTS * 2 * HIDDEN].view(shape),
        checkpoint.outer[1]["experts.down_proj.B"],
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "use_dora of experts or routers is not supported"),
        ({"lora_bias": True}, "lora_bias of experts"),
        ({"init_lora_weights": "olora"}, "'olora' of experts"),
        ({"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens of experts"),
        ({"peft_type": "LOHA"}, "target_parameters goes with LoRA alone"),
        ({"target_parameters": "experts.down_proj"}, "must be a list of names"),
        ({"target_parameters": ["experts.w"]}, "names 'experts.w'; served are .*down_proj"),
        ({"target_parameters": ["weight"]}, "names 'weight'"),
        ({"target_parameters": [*BOTH, "q_proj.weight"]}, "names 'q_proj.weight'"),
        ({"target_parameters": ["experts.down_proj"]}, "down_proj has shape|has shape|base_layer.*targets"),
        (
            {"target_parameters": [*BOTH, "gate.weight"]},
            "gate.weight is targeted, but the file has no lora_A",
        ),
        ({"target_modules": ["gate_proj"]}, "experts.0.gate_proj is targeted, but the file has no"),
        (
            {"target_parameters": [], "target_modules": ["q_proj"]},
            "of no expert.*that the configuration targets",
        ),
        ({"r": 4}, r"has shape \[6, 16\].*need \[12, 16\]"),
    ],
)
def test_what_peft_would_not_give_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    write(tmp_path, of_parameters(), **{"target_parameters": BOTH, **config})
    with pytest.raises(AdapterError, match=reason):
        read(tmp_path)


def test_a_model_without_experts_takes_none(tmp_path: Path) -> None:
    write(tmp_path, of_parameters(), target_parameters=BOTH)
    with pytest.raises(
        AdapterError, match=r"'experts.gate_up_proj'; served are none, as the base model has no"
    ):
        read(tmp_path, DENSE)


def test_stacked_experts_are_no_modules_and_have_a_router_of_their_own_name(tmp_path: Path) -> None:
    """As PEFT sees it, `gate_proj` names nothing there."""
    router: Tensors = {}
    for layer in range(2):
        router |= pair(f"{PREFIX}{layer}.mlp.router", HIDDEN, NUM_EXPERTS, 2)
    config: dict[str, Any] = {"target_modules": ["gate_proj", "router"], "target_parameters": BOTH}
    found = read(write(tmp_path, of_parameters(), **config), STACKED)
    assert sorted(found.outer[0]) == [
        f"experts.{name}.{half}" for name in ("down_proj", "gate_up_proj") for half in "AB"
    ]
    config["target_parameters"] = [*BOTH, "router.weight"]
    found = read(write(tmp_path, of_parameters() | router, **config), STACKED)
    assert torch.equal(found.outer[1]["router.A"], router[f"{PREFIX}1.mlp.router.lora_A.weight"])
    config["target_parameters"] = [*BOTH, "gate.weight"]
    with pytest.raises(AdapterError, match=r"names 'gate.weight'; served are .*, mlp.router.weight"):
        read(write(tmp_path, of_parameters(), **config), STACKED)


def test_a_projection_is_not_targeted_in_two_ways(tmp_path: Path) -> None:
    tensors = of_parameters() | of_modules({(expert, "up_proj"): 2 for expert in range(NUM_EXPERTS)})
    config = {"target_modules": r".*layers\.0\..*\.up_proj", "target_parameters": BOTH}
    with pytest.raises(AdapterError, match=r"experts.0.up_proj is targeted by target_modules and by"):
        read(write(tmp_path, tensors, **config))


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = of_parameters()
    tensors[f"{PREFIX}1.mlp.experts.lora_B.weight"][0, 0] = float("nan")
    with pytest.raises(AdapterError, match="NaN or infinite"):
        read(write(tmp_path, tensors, target_parameters=BOTH))


def test_whole_weights_of_experts_and_routers_are_refused(tmp_path: Path) -> None:
    """PEFT would load them."""
    for name in (
        "mlp.gate.weight",
        "mlp.experts.base_layer.base_layer.down_proj",
        "mlp.experts.0.up_proj.weight",
        "mlp.router.bias",
        "mlp.experts.gate_up_proj_bias",
        "self_attn.sinks",
    ):
        tensors = of_parameters() | {f"{PREFIX}0.{name}": torch.zeros(2, 2)}
        with pytest.raises(AdapterError, match="is a whole weight"):
            read(write(tmp_path, tensors, target_parameters=BOTH))


def test_the_registry_names_and_counts_them_and_they_are_not_merged(tmp_path: Path) -> None:
    registry = open_registry(tmp_path / "state", shapes=SHAPES)
    (tmp_path / "made").mkdir()
    record = registry.register("made", write(tmp_path / "made", of_parameters(), target_parameters=BOTH))
    assert (record.rank, record.targets) == (2, ("experts.down_proj", "experts.gate_up_proj"))
    assert record.num_bytes == 2 * 4 * NUM_EXPERTS * 2 * (HIDDEN + 2 * SIZE + SIZE + HIDDEN)
    with pytest.raises(AdapterError, match=r"experts.down_proj.A \(LoRA of experts or routers\)"):
        registry.merge("mix", Merge((MergePart("made", 1.0),), "cat"))
    registry.close()
