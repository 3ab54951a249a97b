"""A request of a simulated server: the engine's own, and how long it will run."""

from dataclasses import dataclass

from toppings.core import Request


@dataclass(slots=True, eq=False)
class SimRequest(Request):
    """`index` into the trace; `router` that sent it; after `num_to_generate` output tokens it ends."""

    index: int = 0
    router: int = 0
    rank: int = 0
    num_to_generate: int = 1
