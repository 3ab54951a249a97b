"""PEFT's kinds of adapters that are a product of two matrices, whatever they are stored as.

A kind says which tensors a projection has, of which shapes, and what A `[r, in]` and B `[out, r]` they make:

| kind | what is added to the base model's output |
|---|---|
| LoRA | s B A x |
| AdaLoRA | s / (initial rank + 1e-5) · B (E ∘ A) x, E a number per rank |
| VeRA | λb ∘ B (λd ∘ A) x, A and B shared by all projections and cut to their sizes |
| LoHa | s (W1a W1b) ∘ (W2a W2b) x, which is a product of rank r² |
| LoKr | s (W1 ⊗ W2) x, a product of rank r1 r2; factors whole or W1a W1b, W2a W2b |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from toppings.adapters.errors import AdapterError

if TYPE_CHECKING:
    import torch

MAX_RANK = 512
ADALORA_EPSILON = 1e-5

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape]  # of a projection's tensors, by part
Tensors: TypeAlias = Mapping[str, "torch.Tensor"]  # likewise


@dataclass(frozen=True)
class Target:
    """A projection that an adapter is on: its sizes, and the rank that the configuration gives it."""

    name: str
    size_in: int
    size_out: int
    rank: int


@dataclass(frozen=True)
class PeftKind:
    """`parts`: how keys of a projection's tensors end; `shared`: whole keys of those that all projections
    share; `options`: of its configuration, beside those that all kinds have; `rank_option`, `alpha_option`:
    its words for rank and alpha ("": it has none).

    `expect`: the shapes that a projection's tensors must have, given those that are there. `rank`: of the
    product. `product`: A and B in fp32, scale aside.
    """

    title: str
    parts: frozenset[str]
    expect: Callable[[Target, Shapes], dict[str, Shape]]
    rank: Callable[[Target, Shapes], int]
    product: Callable[[Target, Tensors], tuple["torch.Tensor", "torch.Tensor"]]
    options: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    rank_option: str = "r"
    default_rank: int = 8
    alpha_option: str = "lora_alpha"


def product_rank(kind: PeftKind, target: Target, shapes: Shapes) -> int:
    """Raises AdapterError where it is more than is served."""
    rank = kind.rank(target, shapes)
    if rank > MAX_RANK:
        raise AdapterError(
            f"{target.name}: this {kind.title} is a low-rank product of rank {rank}; at most {MAX_RANK} is "
            "served"
        )
    return rank


def _configured_rank(target: Target, shapes: Shapes) -> int:
    return target.rank


# --- LoRA ---

A, B, BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"


def _expect_lora(target: Target, shapes: Shapes) -> dict[str, Shape]:
    return {A: (target.rank, target.size_in), B: (target.size_out, target.rank)}


def _lora(target: Target, tensors: Tensors) -> tuple["torch.Tensor", "torch.Tensor"]:
    return tensors[A], tensors[B]


# --- AdaLoRA ---


def _adalora_rank(target: Target, shapes: Shapes) -> int:
    """What training has left of the initial rank; the file alone says it."""
    return shapes["lora_A"][0] if shapes.get("lora_A") else target.rank


def _expect_adalora(target: Target, shapes: Shapes) -> dict[str, Shape]:
    rank = min(_adalora_rank(target, shapes), target.rank)
    return {"lora_A": (rank, target.size_in), "lora_B": (target.size_out, rank), "lora_E": (rank, 1)}


def _adalora(target: Target, tensors: Tensors) -> tuple["torch.Tensor", "torch.Tensor"]:
    return tensors["lora_A"].float() * tensors["lora_E"].float(), tensors["lora_B"]


# --- VeRA ---

VERA_A, VERA_B = "base_model.vera_A", "base_model.vera_B"


def _expect_vera(target: Target, shapes: Shapes) -> dict[str, Shape]:
    width, height = shapes.get(VERA_A, (0, 0))[-1], shapes.get(VERA_B, (0,))[0]
    return {
        "vera_lambda_b": (target.size_out,),
        "vera_lambda_d": (target.rank,),
        VERA_A: (target.rank, max(width, target.size_in)),
        VERA_B: (max(height, target.size_out), target.rank),
    }


def _vera(target: Target, tensors: Tensors) -> tuple["torch.Tensor", "torch.Tensor"]:
    a = tensors[VERA_A][:, : target.size_in].float() * tensors["vera_lambda_d"].float()[:, None]
    b = tensors[VERA_B][: target.size_out].float() * tensors["vera_lambda_b"].float()[:, None]
    return a, b


# --- LoHa ---

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def _loha_rank(target: Target, shapes: Shapes) -> int:
    return target.rank**2


def _expect_loha(target: Target, shapes: Shapes) -> dict[str, Shape]:
    out, into = (target.size_out, target.rank), (target.rank, target.size_in)
    return dict(zip(_HADA, (out, into, out, into), strict=True))


def _loha(target: Target, tensors: Tensors) -> tuple["torch.Tensor", "torch.Tensor"]:
    """(Σi u_i v_iᵀ) ∘ (Σj p_j q_jᵀ) = Σij (u_i ∘ p_j) (v_i ∘ q_j)ᵀ."""
    w1_a, w1_b, w2_a, w2_b = (tensors[part].float() for part in _HADA)
    a = (w1_b[:, None] * w2_b[None]).flatten(0, 1)
    b = (w1_a[:, :, None] * w2_a[:, None]).flatten(1)
    return a, b


# --- LoKr ---


def _expect_lokr(target: Target, shapes: Shapes) -> dict[str, Shape]:
    """Any factors whose sizes multiply to the projection's."""
    expected: dict[str, Shape] = {}
    (out_1, in_1), (out_2, in_2) = _lokr_sizes(shapes, 1), _lokr_sizes(shapes, 2)
    if out_1 * out_2 != target.size_out or in_1 * in_2 != target.size_in:
        raise AdapterError(
            f"{target.name}: Kronecker factors of {[out_1, in_1]} and {[out_2, in_2]} do not make the base "
            f"model's {[target.size_out, target.size_in]}"
        )
    for number, (out, into) in ((1, (out_1, in_1)), (2, (out_2, in_2))):
        if f"lokr_w{number}" in shapes:
            expected[f"lokr_w{number}"] = (out, into)
        else:
            expected |= {f"lokr_w{number}_a": (out, target.rank), f"lokr_w{number}_b": (target.rank, into)}
    return expected


def _lokr_sizes(shapes: Shapes, number: int) -> tuple[int, int]:
    """(out, in) of a factor; zeros where its tensors are none."""
    whole, a, b = (shapes.get(f"lokr_w{number}{end}", ()) for end in ("", "_a", "_b"))
    if len(whole) == 2:
        return whole[0], whole[1]
    return (a[0], b[1]) if len(a) == len(b) == 2 else (0, 0)


def _lokr_rank(target: Target, shapes: Shapes) -> int:
    ranks = [
        min(_lokr_sizes(shapes, number)) if f"lokr_w{number}" in shapes else target.rank for number in (1, 2)
    ]
    return ranks[0] * ranks[1]


def _lokr(target: Target, tensors: Tensors) -> tuple["torch.Tensor", "torch.Tensor"]:
    """(B1 A1) ⊗ (B2 A2) = (B1 ⊗ B2) (A1 ⊗ A2)."""
    import torch

    (b_1, a_1), (b_2, a_2) = (_lokr_factor(tensors, number) for number in (1, 2))
    return torch.kron(a_1, a_2), torch.kron(b_1, b_2)


def _lokr_factor(tensors: Tensors, number: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    import torch

    if (whole := tensors.get(f"lokr_w{number}")) is None:
        return tensors[f"lokr_w{number}_a"].float(), tensors[f"lokr_w{number}_b"].float()
    out, into = whole.shape
    return (whole.float(), torch.eye(into)) if into <= out else (torch.eye(out), whole.float())


_DROPOUT = frozenset({"rank_dropout", "module_dropout"})

KINDS: dict[str, PeftKind] = {
    "LORA": PeftKind("LoRA", frozenset({A, B, BIAS, MAGNITUDE}), _expect_lora, _configured_rank, _lora),
    "ADALORA": PeftKind(
        "AdaLoRA",
        frozenset({"lora_A", "lora_B", "lora_E"}),
        _expect_adalora,
        _adalora_rank,
        _adalora,
        frozenset(
            {
                "init_r",
                "target_r",
                "tinit",
                "tfinal",
                "deltaT",
                "beta1",
                "beta2",
                "orth_reg_weight",
                "total_step",
            }
        ),
        rank_option="init_r",
        default_rank=12,
    ),
    "VERA": PeftKind(
        "VeRA",
        frozenset({"vera_lambda_b", "vera_lambda_d"}),
        _expect_vera,
        _configured_rank,
        _vera,
        frozenset({"projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"}),
        shared=frozenset({VERA_A, VERA_B}),
        default_rank=256,
        alpha_option="",
    ),
    "LOHA": PeftKind(
        "LoHa",
        frozenset(_HADA),
        _expect_loha,
        _loha_rank,
        _loha,
        _DROPOUT | {"alpha", "use_effective_conv2d", "init_weights"},
        alpha_option="alpha",
    ),
    "LOKR": PeftKind(
        "LoKr",
        frozenset(f"lokr_w{number}{end}" for number in (1, 2) for end in ("", "_a", "_b")),
        _expect_lokr,
        _lokr_rank,
        _lokr,
        _DROPOUT
        | {"alpha", "use_effective_conv2d", "init_weights", "decompose_both", "decompose_factor"}
        | {"rank_dropout_scale"},
        alpha_option="alpha",
    ),
}
"""By PEFT's `peft_type`."""
