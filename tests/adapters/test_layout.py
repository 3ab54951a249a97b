import pytest

from tests.adapters.fixtures import HIDDEN, KV, NUM_LAYERS, SHAPES
from toppings.adapters.layout import AdapterLayout, LayerLayout
from toppings.core import MODULES

MIXED = [[4, 0, 8, 0, 0, 0, 1], [0] * 7, [512, 1, 2, 3, 4, 5, 6]]


def test_layout_survives_a_json_round_trip() -> None:
    layout = AdapterLayout.build(MIXED, SHAPES, "bfloat16")
    assert AdapterLayout.from_json(layout.to_json()) == layout


def test_a_layout_is_hashed_once_and_alike_where_it_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every cold prefill prices and plans are looked up by it."""
    layout, same = (AdapterLayout.build(MIXED, SHAPES, "bfloat16") for _ in range(2))
    other = AdapterLayout.build(MIXED[::-1], SHAPES, "bfloat16")
    hashed: list[LayerLayout] = []

    def note(layer: LayerLayout) -> int:
        hashed.append(layer)
        return hash(layer.ranks)

    monkeypatch.setattr(LayerLayout, "__hash__", note)
    assert len({layout: 1, same: 2, other: 3}) == 2
    assert len(hashed) == 3 * len(MIXED)
    assert {layout: 1}[same] == 1
    assert len(hashed) == 3 * len(MIXED)


def test_block_holds_all_a_halves_then_all_b_halves() -> None:
    layer = AdapterLayout.build([[4, 0, 8, 0, 0, 0, 0]] * NUM_LAYERS, SHAPES, "float32").layers[0]
    assert layer.a_offsets == (0, -1, 4 * HIDDEN, -1, -1, -1, -1)
    assert layer.numel_a == 12 * HIDDEN
    assert layer.b_offsets == (12 * HIDDEN, -1, 12 * HIDDEN + 4 * HIDDEN, -1, -1, -1, -1)
    assert layer.numel == 12 * HIDDEN + 4 * HIDDEN + 8 * KV


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_block_starts_at_a_multiple_of_64_bytes(dtype: str) -> None:
    layout = AdapterLayout.build(MIXED, SHAPES, dtype)
    assert all(layout.layer_offset_bytes(i) % 64 == 0 for i in range(NUM_LAYERS))
    assert layout.layer_offset_bytes(2) == layout.layer_bytes(0) + layout.layer_bytes(1)
    assert layout.num_bytes == sum(layout.layer_bytes(i) for i in range(NUM_LAYERS))


def test_layer_without_targets_takes_no_room() -> None:
    layer = AdapterLayout.build(MIXED, SHAPES, "bfloat16").layers[1]
    assert layer.numel == 0
    assert set(layer.a_offsets) == set(layer.b_offsets) == {-1}


def test_targets_and_rank_are_taken_over_all_layers() -> None:
    layout = AdapterLayout.build([[4, 0, 0, 0, 0, 0, 0], [0] * 7, [0, 0, 0, 0, 0, 0, 9]], SHAPES, "bfloat16")
    assert layout.max_rank == 9
    assert layout.targets == (MODULES[0], MODULES[6])
