"""Memory that is put into huge pages keeps its values; where there are none, nothing happens."""

from pathlib import Path

import pytest
import torch

from toppings.ops import huge_pages
from toppings.ops.huge_pages import joined, use_huge_pages, within
from toppings.ops.linear import Linear, QuantizedLinear
from toppings.ops.quantized import quantize


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def test_spans_are_joined_in_whole_pages() -> None:
    assert list(joined([(25, 31), (3, 9), (11, 19)], 10)) == [(0, 40)]
    assert list(joined([(45, 46), (3, 9)], 10)) == [(0, 10), (40, 50)]


def test_only_whole_pages_of_a_region_are_taken() -> None:
    assert list(within([(0, 40), (60, 80)], [(5, 35), (35, 70)], 10)) == [(10, 30), (60, 70)]


def test_values_and_addresses_stay() -> None:
    data = torch.arange(6 << 20)
    before, address = data.clone(), data.data_ptr()
    num_bytes = use_huge_pages([span_of(data)])
    assert 0 <= num_bytes <= data.nbytes + 4 * (huge_pages.page_bytes() or 0)
    assert data.data_ptr() == address
    assert torch.equal(data, before)


@pytest.mark.parametrize("text", ["always madvise [never]\n", None])
def test_where_huge_pages_are_not_to_be_used_nothing_is_asked_for(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "enabled").write_text(text)
    (tmp_path / "hpage_pmd_size").write_text("2097152")
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    monkeypatch.setattr(huge_pages, "private_memory", lambda: pytest.fail("memory was looked for"))
    assert use_huge_pages([span_of(torch.zeros(6 << 20))]) == 0


def test_small_models_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "private_memory", lambda: pytest.fail("memory was looked for"))
    assert use_huge_pages([span_of(torch.zeros(64))]) == 0


def test_products_say_where_their_weights_lie(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 128).to(dtype)
    ((start, stop),) = Linear(weight).spans()
    assert stop - start >= weight.nbytes
    for bits in (8, 4):
        quantized = quantize(weight, bits)
        spans = list(QuantizedLinear(quantized).spans())
        assert spans[0] == span_of(quantized.codes)
        assert sum(stop - start for start, stop in spans) == quantized.nbytes
