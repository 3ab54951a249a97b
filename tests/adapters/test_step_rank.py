"""What an adapter counts for in a step, against operations that torch counts of a token's way through it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.adapters.fixtures import open_registry
from tests.adapters.fixtures import write_adapter as write_plain
from tests.adapters.test_expert_plan import (
    BOTH,
    HIDDEN,
    NUM_EXPERTS,
    PREFIX,
    SHAPES,
    SIZE,
    SIZES,
    Tensors,
    of_modules,
    of_parameters,
    pair,
    read,
    write,
)
from toppings.adapters.layout import AdapterLayout
from toppings.adapters.packed import pack_weights
from toppings.adapters.step_rank import step_rank

NUM_PER_TOKEN = 2


def through(tensors: Tensors, stem: str, num_experts: int = 1, share: int = 1) -> None:
    """One token through A and B of `stem`; of several experts' in one, through `share` of them."""
    a, b = (tensors[f"{stem}.lora_{half}.weight"] for half in "AB")
    rank = a.shape[0] // num_experts
    for expert in range(share):
        own = slice(expert * rank, (expert + 1) * rank)
        torch.ones(1, a.shape[1]) @ a[own].T @ b[:, own].T


def count(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def of_rank_one() -> int:
    """Of q, k and v in both layers."""
    q_k_v = pair("q", HIDDEN, HIDDEN, 1)
    return 2 * 3 * count(lambda: through(q_k_v, "q"))


def pack(path: Path) -> AdapterLayout:
    return pack_weights(read(path), "float32")[0]


def test_a_token_counts_for_the_experts_it_goes_to_not_for_all(tmp_path: Path) -> None:
    tensors = of_parameters(rank=8)

    def run() -> None:
        for layer in range(2):
            for stem in (f"{PREFIX}{layer}.mlp.experts.base_layer", f"{PREFIX}{layer}.mlp.experts"):
                through(tensors, stem, NUM_EXPERTS, NUM_PER_TOKEN)

    layout = pack(write(tmp_path, tensors, r=8, target_parameters=BOTH))
    assert step_rank(layout, SHAPES) == -(-count(run) // of_rank_one())
    assert step_rank(layout, SHAPES) < layout.num_bytes / (
        4 * 2 * 3 * 2 * HIDDEN
    )  # as the bytes of all would


def test_either_form_of_the_same_adapter_counts_the_same(tmp_path: Path) -> None:
    names = ("gate_proj", "up_proj", "down_proj")
    tensors = of_modules({(expert, name): 8 for expert in range(NUM_EXPERTS) for name in names})
    (tmp_path / "modules").mkdir()
    layout = pack(
        write(tmp_path / "modules", tensors, r=8, target_modules=list(names), layers_to_transform=[0])
    )

    def run() -> None:
        for expert in range(NUM_PER_TOKEN):
            for name in names:
                through(tensors, f"{PREFIX}0.mlp.experts.{expert}.{name}")

    assert step_rank(layout, SHAPES) == -(-count(run) // of_rank_one())


def test_a_router_and_projections_count_beside_it(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for layer in range(2):
        tensors |= pair(f"{PREFIX}{layer}.mlp.gate", HIDDEN, NUM_EXPERTS, 4)
        tensors |= pair(f"{PREFIX}{layer}.self_attn.q_proj", HIDDEN, HIDDEN, 4)
    layout = pack(write(tmp_path, tensors, r=4, target_modules=["gate", "q_proj"]))
    stems = [f"{PREFIX}{layer}.mlp.gate" for layer in range(2)]
    of_routers = sum(count(lambda stem=stem: through(tensors, stem)) for stem in stems)  # type: ignore[misc]
    assert step_rank(layout, SHAPES) == 4 - (-of_routers // of_rank_one())


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_without_experts_it_is_the_largest_rank(rank: int) -> None:
    layout = AdapterLayout.build([[rank, 0, 1, 0, 0, 0, 0], [0] * 7], SHAPES, "float32")
    assert step_rank(layout, SHAPES) == rank


def test_what_travels_is_what_the_file_has_of_all_experts(tmp_path: Path) -> None:
    tensors = of_parameters(rank=8)
    layout = pack(write(tmp_path, tensors, r=8, target_parameters=BOTH))
    assert layout.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert SIZES[-1] == (SIZE, HIDDEN)


def test_the_registry_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "experts").mkdir()
    path = write(tmp_path / "experts", of_parameters(rank=8), r=8, target_parameters=BOTH)
    registry = open_registry(tmp_path / "state", shapes=SHAPES)
    try:
        record = registry.register("experts", path)
        assert (record.rank, record.step_rank) == (8, step_rank(pack(path), SHAPES))
        assert record.step_rank > 8
    finally:
        registry.close()
    plain = open_registry(tmp_path / "plain-state")
    try:
        record = plain.register("plain", write_plain(tmp_path / "plain"))
        assert record.step_rank == record.rank
    finally:
        plain.close()
