"""Experts with adapters' LoRA, by every form of the kernels, against one token and one expert at a time."""

import pytest
import torch
from torch import Tensor

from tests.ops.gpu_world import DEVICE, needs_triton
from tests.tolerances import assert_close
from toppings.adapters.device_pool import DevicePool
from toppings.adapters.layout import AdapterLayout, BaseShapes
from toppings.engine.expert_lora import StepExpertLora
from toppings.ops import dispatch
from toppings.ops.activation import silu_mul
from toppings.ops.experts import ExpertLinears, Experts, route
from toppings.ops.linear import Linear
from toppings.ops.lora import LoraSegments

HIDDEN, SIZE, NUM, TOP_K, LAYERS = 32, 48, 4, 2, 2
SHAPES = BaseShapes(LAYERS, (*((HIDDEN, HIDDEN),) * 4, *((HIDDEN, SIZE),) * 2, (SIZE, HIDDEN)))
SIZES = {
    "gate_proj": (HIDDEN, SIZE),
    "up_proj": (HIDDEN, SIZE),
    "down_proj": (SIZE, HIDDEN),
    "gate_up_proj": (HIDDEN, 2 * SIZE),
}
ADAPTERS: tuple[dict[str, int], ...] = (
    {"gate_up_proj": 3, "down_proj": 8},
    {"gate_proj": 4, "up_proj": 1, "router": 2},
    {},
    {"down_proj": 16},
)
FEW, SOME = (1, 20, 1, 1, 1), (1, 20, 3, 2, 9)  # rows of the base model, then of each adapter


def place(pool: DevicePool, ranks: dict[str, int]) -> int:
    extras = []
    for name, rank in ranks.items():
        sizes = SIZES.get(name, (HIDDEN, NUM))
        shape = (rank,) if name == "router" else (NUM, rank)
        prefix = name if name == "router" else f"experts.{name}"
        extras += [(f"{prefix}.{half}", (*shape, size)) for half, size in zip("AB", sizes, strict=True)]
    layout = AdapterLayout.build([[0] * 7] * LAYERS, SHAPES, "float32", [tuple(extras)] * LAYERS)
    slot = pool.try_place(layout)
    assert slot is not None
    pool.mark_loaded(slot)
    return slot


def delta(pool: DevicePool, slot: int, name: str, expert: int) -> Tensor | float:
    """Aᵀ B [in, out]."""
    a, b = (pool.find_extra(slot, 1, f"experts.{name}.{half}") for half in "AB")
    return 0.0 if a is None or b is None else a[expert].t() @ b[expert]


def expected(x: Tensor, weights: tuple[Tensor, Tensor, Tensor], pool: DevicePool, slots: list[int]) -> Tensor:
    router, gate_up, down = weights
    rows = []
    for token, slot in zip(x, slots, strict=True):
        logits = token @ router.t()
        if slot >= 0 and (a := pool.find_extra(slot, 1, "router.A")) is not None:
            b = pool.find_extra(slot, 1, "router.B")
            assert b is not None
            logits = logits + token @ a.t() @ b
        chosen, shares = route(logits[None], TOP_K, is_normalised=True)
        total = torch.zeros(HIDDEN)
        for expert, share in zip(chosen[0].tolist(), shares[0], strict=True):
            first, second = gate_up[expert].t().clone(), down[expert].t().clone()
            if slot >= 0:
                first += delta(pool, slot, "gate_up_proj", expert)
                first[:, :SIZE] += delta(pool, slot, "gate_proj", expert)
                first[:, SIZE:] += delta(pool, slot, "up_proj", expert)
                second += delta(pool, slot, "down_proj", expert)
            total += share * (silu_mul((token @ first)[None]) @ second)[0]
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "form", ["numba", "torch", pytest.param("triton", marks=[needs_triton, pytest.mark.gpu])]
)
@pytest.mark.parametrize("lens", [FEW, SOME, tuple(4 * n for n in SOME)])
def test_each_row_has_its_own_adapters_part_of_its_own_experts(
    form: str, lens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts have few rows, some or many."""
    torch.manual_seed(0)
    device = DEVICE if form == "triton" else torch.device("cpu")
    pool = DevicePool(LAYERS, 1 << 20, torch.float32, num_slots=8)
    pool.arena.normal_(0, 0.2)
    slots = [-1, *(place(pool, ranks) for ranks in ADAPTERS)]
    indptr = [sum(lens[:i]) for i in range(len(lens) + 1)]
    x = torch.randn(indptr[-1], HIDDEN)
    router = torch.randn(NUM, HIDDEN)
    gate_up = torch.randn(NUM, 2 * SIZE, HIDDEN) / HIDDEN**0.5
    down = torch.randn(NUM, HIDDEN, SIZE) / SIZE**0.5
    rows = [slot for slot, n in zip(slots, lens, strict=True) for _ in range(n)]
    wanted = expected(x, (router, gate_up, down), pool, rows)
    monkeypatch.setattr(dispatch, "USE_NUMBA", form == "numba")
    if form == "triton":
        monkeypatch.setattr(dispatch, "TRITON_DEVICES", (device.type,))
        moved = DevicePool(LAYERS, 1 << 20, torch.float32, device, num_slots=8)
        assert [place(moved, ranks) for ranks in ADAPTERS] == slots[1:]
        moved.arena.copy_(pool.arena)
        pool = moved
    first, second = (ExpertLinears(each.flatten(0, 1).to(device), NUM) for each in (gate_up, down))
    experts = Experts(Linear(router.to(device)), first, second, silu_mul, TOP_K, is_normalised=True)
    step = StepExpertLora(pool, LoraSegments(indptr, slots), {})
    assert_close(experts(x.to(device), step.of_layer(1)).cpu(), wanted, scale=4)
