"""What PEFT computes for a checkpoint: by projection, the matrix that it adds to the base weight."""

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.adapters.fixtures import SHAPES, tiny_llama
from toppings.adapters.checkpoint import read_checkpoint
from toppings.adapters.checkpoint_plan import module_name
from toppings.core import MODULES

Deltas = dict[str, torch.Tensor]
"""Module name to [out, in], fp32; those that are zero are left out."""


@cache
def _base() -> Any:
    return tiny_llama()


def peft_deltas(path: Path) -> Deltas:
    """Raises whatever PEFT raises where it does not load the checkpoint."""
    import peft  # slow to import

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(_base()), str(path))
    deltas = {}
    for name, module in model.base_model.model.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            deltas[name] = module.get_delta_weight("default").float()
    return _without_zeros(deltas)


def our_deltas(path: Path) -> Deltas:
    weights = read_checkpoint(path, SHAPES).weights
    return _without_zeros(
        {
            module_name(*place): each.scale * (each.b.float() @ each.a.float())
            for place, each in weights.items()
        }
    )


def _without_zeros(deltas: Deltas) -> Deltas:
    return {name: delta.detach() for name, delta in deltas.items() if delta.count_nonzero()}


def assert_same(ours: Deltas, theirs: Deltas) -> None:
    assert set(ours) == set(theirs)
    assert all(name.rsplit(".", 1)[-1] in MODULES for name in ours)
    for name, delta in ours.items():
        torch.testing.assert_close(delta, theirs[name], rtol=1e-5, atol=1e-30, msg=name)
