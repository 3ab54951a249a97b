"""What is folded into A and B because it is told relative to the base model's weight W.

* **DoRA** (arXiv:2402.09353, as PEFT computes it): y = g ∘ (W x + s B A x) + bias, g = m / ‖W + s B A‖, with
  a magnitude m for each output and the norm of its row. So B becomes g ∘ B; what is left for the base model's
  output is a gain, y += (g - 1) ∘ y, and, as its bias has no part in that, an offset of (1 - g) ∘ bias.
* **PiSSA** (arXiv:2404.02948) and **OLoRA** (arXiv:2406.01775) as saved: training began with s B0 A0, the
  first r terms of W's singular value or QR decomposition, taken out of W. So what is added to W is
  s B A - s B0 A0, a product of rank 2 r.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from toppings.adapters.base_weights import OpenWeights
from toppings.adapters.errors import AdapterError
from toppings.adapters.peft_config import OLORA, PISSA

if TYPE_CHECKING:
    import torch

MAX_START_FLOPS = {PISSA: 4e12, OLORA: 1e14}
"""Of all decompositions of one adapter: minutes. Singular values come at a fortieth of a product's speed."""


@dataclass(frozen=True)
class ProjectionWeights:
    """A `[r, in]` and B `[out, r]`, and the scale still to be applied to B.

    Before the adapter's part is added, the base model's output y is changed by `gain` and `offset`, fp32
    `[out]` or None: y += gain ∘ y + offset.
    """

    a: "torch.Tensor"
    b: "torch.Tensor"
    scale: float
    gain: "torch.Tensor | None" = None
    offset: "torch.Tensor | None" = None

    def rows(self, outputs: slice) -> "ProjectionWeights":
        """Those of some outputs."""
        gain, offset = (None if each is None else each[outputs] for each in (self.gain, self.offset))
        return replace(self, b=self.b[outputs], gain=gain, offset=offset)


def fold_magnitude(
    weights: ProjectionWeights,
    magnitude: "torch.Tensor",
    weight: "torch.Tensor",
    bias: "torch.Tensor | None",
    module: str,
) -> ProjectionWeights:
    """DoRA's; magnitude: [out], weight: [out, in], bias: [out]. Raises AdapterError where a row of W + s B A
    is zero."""
    import torch

    adapted = torch.addmm(weight, weights.b.float(), weights.a.float(), alpha=weights.scale)
    norm = torch.linalg.vector_norm(adapted, dim=1)
    if not bool((norm > 0).all()):
        raise AdapterError(f"{module}: a row of the adapted weight is zero, which DoRA cannot scale")
    gain = magnitude.float() / norm
    return replace(
        weights,
        b=weights.b.float() * gain[:, None],
        gain=gain - 1,
        offset=None if bias is None else (1 - gain) * bias,
    )


def fold_start(weights: ProjectionWeights, start: str, base: OpenWeights, module: str) -> ProjectionWeights:
    """PiSSA's or OLoRA's."""
    import torch

    rank, scale = weights.a.shape[0], weights.scale
    a_0, b_0 = (_pissa if start == PISSA else _olora)(base.weight(module), rank)
    # PiSSA starts with s B0 A0 = the first terms whatever s is, OLoRA with B0 A0 = those.
    b_0 = -b_0 if start == PISSA else -scale * b_0
    a = torch.cat((weights.a.float(), a_0))
    return ProjectionWeights(a, torch.cat((weights.b.float() * scale, b_0), dim=1), 1.0)


def _pissa(weight: "torch.Tensor", rank: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    import torch

    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    roots = values[:rank].sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def _olora(weight: "torch.Tensor", rank: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    import torch

    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def check_start(start: str, sizes: list[tuple[int, int]]) -> None:
    """Raises AdapterError where decomposing weights of these (in, out) sizes would take too long."""
    flops = sum(4 * num_in * num_out * min(num_in, num_out) for num_in, num_out in sizes)
    if flops > MAX_START_FLOPS[start]:
        raise AdapterError(
            f"init_lora_weights is {start!r}, and decomposing the base model's weights takes {flops:.1e} "
            f"operations (at most {MAX_START_FLOPS[start]:.0e}); save the adapter with "
            "path_initial_model_for_weight_conversion to make it a plain LoRA"
        )
