import pytest

from tests.adapters.test_loader import LAYOUT, FakeSource
from toppings.adapters.layout import by_layer
from toppings.adapters.loader import LoadHandle
from toppings.adapters.modes import LOADING_MODES, make_mode
from toppings.config import MODES


class RecordingHandle(LoadHandle):
    def __init__(self) -> None:
        super().__init__(FakeSource(), by_layer(range(LAYOUT.num_layers)))
        self.waited_for: list[int] = []

    def wait(self, layer: int) -> None:
        self.waited_for.append(layer)


@pytest.mark.parametrize(
    ("mode", "layers"), [("pipelined", [1]), ("on_demand", [0, 1, 2]), ("cached", [0, 1, 2])]
)
def test_mode_waits_for_the_layers_it_says(mode: str, layers: list[int]) -> None:
    load = RecordingHandle()
    make_mode(mode).wait_before_layer(load, 1)
    assert load.waited_for == layers


@pytest.mark.parametrize("mode", LOADING_MODES)
def test_only_cached_pins_all(mode: str) -> None:
    assert make_mode(mode).pins_all == (mode == "cached")
    assert make_mode(mode).load_order(LAYOUT, 64) == by_layer(range(LAYOUT.num_layers))


def test_every_mode_can_be_configured() -> None:
    assert set(LOADING_MODES) < set(MODES)


def test_unknown_mode_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="'eager' is unknown; choose one of cached, on_demand, pipelined"):
        make_mode("eager")
