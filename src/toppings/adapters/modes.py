"""What the prefill of a cold adapter does: one policy object per mode."""

from typing import Protocol

from toppings.adapters.layout import AdapterLayout, LoadOrder, by_layer
from toppings.adapters.loader import LoadHandle


class LoadingMode(Protocol):
    """`pins_all`: every adapter is loaded at start, or when it is first asked for, and never evicted."""

    name: str
    pins_all: bool

    def wait_before_layer(self, load: LoadHandle, layer: int) -> None:
        """Called for each load under way before a layer's first projection group is computed on the device.

        Raises AdapterError where the weights never come.
        """

    def load_order(self, layout: AdapterLayout, num_tokens: int) -> LoadOrder:
        """In what order the adapter's blocks should travel for a prefill of `num_tokens`."""

    def load_tokens(self, layout: AdapterLayout) -> float | None:
        """How many tokens of a prompt the device computes in the time that the adapter travels; None where
        nothing was measured."""


class OnDemandMode:
    """The whole adapter is there before the forward begins."""

    name = "on_demand"
    pins_all = False

    def wait_before_layer(self, load: LoadHandle, layer: int) -> None:
        load.wait_all()

    def load_order(self, layout: AdapterLayout, num_tokens: int) -> LoadOrder:
        return by_layer(range(layout.num_layers))

    def load_tokens(self, layout: AdapterLayout) -> float | None:
        return None


class CachedMode(OnDemandMode):
    """No adapter is ever cold, but for the one whose first use is its first load."""

    name = "cached"
    pins_all = True


class PipelinedMode:
    """Each layer waits for its own weights, while those of the next ones travel."""

    name = "pipelined"
    pins_all = False

    def wait_before_layer(self, load: LoadHandle, layer: int) -> None:
        load.wait(layer)

    def load_order(self, layout: AdapterLayout, num_tokens: int) -> LoadOrder:
        return by_layer(range(layout.num_layers))

    def load_tokens(self, layout: AdapterLayout) -> float | None:
        return None


LOADING_MODES: dict[str, type[LoadingMode]] = {
    mode.name: mode for mode in (CachedMode, OnDemandMode, PipelinedMode)
}


def make_mode(name: str) -> LoadingMode:
    """Raises ValueError for a name that is not in `LOADING_MODES`."""
    if name not in LOADING_MODES:
        raise ValueError(f"mode {name!r} is unknown; choose one of {', '.join(LOADING_MODES)}")
    return LOADING_MODES[name]()
