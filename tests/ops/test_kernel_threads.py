import pytest
import torch

from tests.gate import NO_TEAM
from toppings.ops.norm import rms_norm


def test_one_thread_and_torchs_team_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from toppings.ops import cpu_kernel

    if not cpu_kernel.USE_TEAM:
        pytest.skip(NO_TEAM)
    x, weight = torch.randn(500, 256), torch.rand(256)
    with_team = rms_norm(x, weight, 1e-6)
    monkeypatch.setattr(cpu_kernel, "USE_TEAM", False)
    assert torch.equal(rms_norm(x, weight, 1e-6), with_team)


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    x = torch.randn(1, 4096)
    x[0, :4] = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, torch.inf, torch.nan]
    )  # two ties, two that are no numbers
    gate_up = torch.cat((torch.full_like(x, 100.0), x), dim=1).bfloat16()
    from toppings.ops.activation import silu_mul

    expected = (gate_up[:, :4096].float().sigmoid() * 100 * gate_up[:, 4096:].float()).bfloat16()
    assert torch.equal(silu_mul(gate_up).nan_to_num(7.0), expected.nan_to_num(7.0))
