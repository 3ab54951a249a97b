"""When products are measured, where the result is kept, and what a start makes of it."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from toppings.config import EngineConfig
from toppings.engine import products
from toppings.engine.products import choose_products, products_path
from toppings.model.config import ModelConfig
from toppings.model.named import named_config
from toppings.ops import product_profile
from toppings.ops.product_profile import ProductProfile, ProductTime, this_cpu
from toppings.ops.products import Forms, forms_for, rule_for, use_measured

BF16, NUM_ROWS = torch.bfloat16, 7
MODEL = named_config("llama-2-7b")
CONFIG = EngineConfig(model="llama-2-7b", load_format="dummy")


class Measuring:
    """Stands in for `product_profile.measure`: one row is best streamed up to NUM_ROWS rows."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.waited = 0.0

    def __call__(self, dtype: torch.dtype, widths: dict[int, int]) -> ProductProfile:
        self.num_calls += 1
        forms = (("stream", 1.0), ("panels", 2.0), ("packed", 9.0))
        times = [
            ProductTime(num_in, num_out, NUM_ROWS, *each)
            for num_in, num_out in widths.items()
            for each in forms
        ]
        here = (this_cpu(), torch.get_num_threads(), str(dtype).removeprefix("torch."))
        return ProductProfile(*here, 20.0, 80.0, self.waited, tuple(times))


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Iterator[Measuring]:
    fake = Measuring()
    monkeypatch.setattr(product_profile, "measure", fake)
    yield fake
    use_measured(BF16, {})


def test_the_first_start_measures_and_the_next_reads(
    measuring: Measuring, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(2):
        profile = choose_products(CONFIG, MODEL, BF16, tmp_path / "state")
        assert profile is not None
        assert {t.num_in: t.num_out for t in profile.times} == {4096: 32000, 11008: 4096}
        assert forms_for(BF16, 4096) == Forms(is_packed=False, max_stream_rows=NUM_ROWS)
        assert all(line in caplog.messages for line in profile.table())
        caplog.clear()
    assert measuring.num_calls == 1


def test_another_cpu_is_measured_anew(measuring: Measuring, tmp_path: Path) -> None:
    profile = choose_products(CONFIG, MODEL, BF16, tmp_path)
    assert profile is not None
    dataclasses.replace(profile, cpu="another").write(products_path(tmp_path, BF16))
    choose_products(CONFIG, MODEL, BF16, tmp_path)
    assert measuring.num_calls == 2


def test_a_disturbed_measurement_is_neither_used_nor_kept(
    measuring: Measuring, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measuring.waited = 0.5
    assert choose_products(CONFIG, MODEL, BF16, tmp_path) is None
    assert forms_for(BF16, 4096) == rule_for(BF16)
    assert not list(tmp_path.iterdir())
    assert "50%" in caplog.text
    assert str(rule_for(BF16)) in caplog.text


def test_what_cannot_be_kept_serves_all_the_same(
    measuring: Measuring, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    choose_products(CONFIG, MODEL, BF16, tmp_path / "file")
    assert forms_for(BF16, 4096).max_stream_rows == NUM_ROWS
    assert "not kept" in caplog.text


@pytest.mark.parametrize("change", [{"num_layers": 0, "vocab_size": 100}, {}])
def test_small_and_split_models_are_served_by_the_rule(
    change: dict[str, int], measuring: Measuring, tmp_path: Path
) -> None:
    model: ModelConfig = dataclasses.replace(MODEL, **change)  # type: ignore[arg-type]
    config = CONFIG if change else dataclasses.replace(CONFIG, tensor_parallel_size=2)
    assert choose_products(config, model, BF16, tmp_path) is None
    assert measuring.num_calls == 0


@pytest.mark.parametrize(("dtype", "is_told"), [("float32", True), ("bfloat16", False), ("auto", False)])
def test_a_type_that_reads_more_than_the_checkpoint_has_is_told(
    dtype: str, is_told: bool, measuring: Measuring, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    kind = BF16 if dtype == "auto" else getattr(torch, dtype)
    choose_products(dataclasses.replace(CONFIG, dtype=dtype), model, kind, tmp_path)
    assert ("--dtype float32 reads 4 bytes" in caplog.text) is is_told
    use_measured(kind, {})
    assert products.products_path(tmp_path, kind).exists()
