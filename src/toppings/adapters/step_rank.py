"""What an adapter counts for in a step: the rank that performance models, and so routers, multiply."""

from math import prod

from toppings.adapters.layout import EXPERTS, ROUTER, AdapterLayout, BaseShapes, ranks_of_extras
from toppings.core import GROUPS


def step_rank(layout: AdapterLayout, shapes: BaseShapes) -> int:
    """Its largest rank, as published, and beside it what it has on experts and routers: the rank that a LoRA
    on q, k and v of every layer needs for as many products a token. `shapes`: of the base model, whose
    mixture says how many experts a token goes to.

    `toppings profile batches` times adapters on q, k and v unless it is told otherwise.
    """
    of_experts = [extra for layer in layout.layers for extra in layer.extras if _is_of_experts(extra[0])]
    others = [extra for layer in layout.layers for extra in layer.extras if not _is_of_experts(extra[0])]
    rank = max(layout.max_rank, *ranks_of_extras(others).values(), 0)
    if not of_experts:
        return rank
    per_rank = shapes.num_layers * sum(sum(shapes.sizes[module]) for module in GROUPS["qkv"])
    return rank + -(-sum(_num_products(*extra, shapes) for extra in of_experts) // per_rank)


def _is_of_experts(name: str) -> bool:
    return name.split(".", maxsplit=1)[0] in (EXPERTS, ROUTER)


def _num_products(name: str, shape: tuple[int, ...], shapes: BaseShapes) -> int:
    """Of a token with this A or B: of a router's whole one, of each of the experts that it goes to."""
    if name.split(".", maxsplit=1)[0] == ROUTER:
        return prod(shape)
    assert shapes.mixture is not None
    return shapes.mixture.num_per_token * prod(shape[1:])
