"""Placements by name: which servers should hold which adapter. One short file each, chosen here and nowhere
else.
"""

from toppings.cluster.placement.adaptive import Adaptive
from toppings.cluster.placement.base import Placement, PlacementSettings
from toppings.cluster.placement.hashed import ShuffleShard, StaticK
from toppings.cluster.placement.plan import EMPTY_PLAN, Plan, Untold

NO_PLACEMENT = "none"
"""Any server may hold any adapter: the routing policy alone decides."""

PLACEMENTS: dict[str, type[Placement] | None] = {
    NO_PLACEMENT: None,
    "static_k": StaticK,
    "shuffle_shard": ShuffleShard,
    "adaptive": Adaptive,
}


def make_placement(name: str, settings: PlacementSettings | None = None) -> Placement | None:
    """None for `none`. Raises ValueError for an unknown name."""
    if name not in PLACEMENTS:
        raise ValueError(f"unknown placement {name!r}; choose one of {', '.join(PLACEMENTS)}")
    kind = PLACEMENTS[name]
    return None if kind is None else kind(settings or PlacementSettings())


__all__ = [
    "EMPTY_PLAN",
    "NO_PLACEMENT",
    "PLACEMENTS",
    "Placement",
    "PlacementSettings",
    "Plan",
    "Untold",
    "make_placement",
]
