"""Which form serves a product, and that every form gives the product."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from toppings.ops import dispatch, linear, product_profile, products
from toppings.ops.linear import Linear
from toppings.ops.product_profile import ProductProfile, ProductTime, this_cpu
from toppings.ops.products import MANY_ROWS, MAX_STREAM_ROWS, Forms, forms_for, use_measured

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
STREAM, PANELS = Forms(is_packed=False, max_stream_rows=64), Forms(is_packed=False)


@pytest.fixture(autouse=True)
def nothing_measured() -> Iterator[None]:
    yield
    for dtype in (BF16, F16, F32):
        use_measured(dtype, {})
    products.is_native.cache_clear()


def has_instructions(monkeypatch: pytest.MonkeyPatch, bf16: bool, f16: bool) -> None:
    """A CPU as torch would describe it."""
    products.is_native.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: f16, raising=False)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("forms", [STREAM, PANELS], ids=["stream", "panels"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 9, 16, 33])
@pytest.mark.parametrize(("num_out", "num_in"), [(1, 8), (47, 50), (50, 131), (193, 1024)])
def test_a_widened_product_is_as_near_to_fp64_as_its_type_allows(
    dtype: torch.dtype, num_out: int, num_in: int, num_rows: int, has_bias: bool, forms: Forms
) -> None:
    weight, x = torch.randn(num_out, num_in).to(dtype), torch.randn(num_rows, num_in).to(dtype)
    bias = torch.randn(num_out).to(dtype) if has_bias else None
    expected = exact(x, weight, bias)
    y = Linear(weight, bias, forms=forms)(x)
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    rounding = torch.finfo(dtype).eps / 2 * expected.abs()  # of the result, once
    sums = torch.finfo(F32).eps * num_in**0.5 * (x.double().abs() @ weight.double().abs().t() + 4)
    assert ((y.double() - expected).abs() <= rounding + sums).all()


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_wide_weights_are_widened_panel_by_panel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PANEL_ELEMENTS", 64 * 64)
    weight, x = torch.randn(130, 64).to(dtype), torch.randn(20, 64).to(dtype)
    y = products.mm_widened(x, weight)
    assert torch.equal(y, (x.float() @ weight.float().t()).to(dtype))
    with torch.inference_mode():
        assert torch.equal(products.mm_widened(x, weight), y)


@pytest.mark.parametrize(("bf16", "f16"), [(True, True), (True, False), (False, False)])
def test_the_cpus_own_products_are_chosen_where_there_are_any(
    bf16: bool, f16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_instructions(monkeypatch, bf16, f16)
    for dtype, is_native in ((BF16, bf16), (F16, f16), (F32, True)):
        assert forms_for(dtype, 1024).is_packed is is_native
        assert products.is_widened(torch.empty(1, dtype=dtype)) is not is_native
        product = Linear(torch.randn(64, 64).to(dtype))
        assert product.is_packed is (is_native and linear.packed_reason(dtype)[0])


def test_a_weight_that_is_not_packed_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    has_instructions(monkeypatch, bf16=False, f16=False)
    weight = torch.randn(64, 64).to(BF16)
    assert Linear(weight)._weight is weight


def test_without_numba_all_rows_go_through_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    has_instructions(monkeypatch, bf16=False, f16=False)
    monkeypatch.setattr(dispatch, "USE_NUMBA", False)
    assert forms_for(BF16, 64) == PANELS
    weight, x = torch.randn(40, 64).to(BF16), torch.randn(1, 64).to(BF16)
    assert torch.equal(Linear(weight)(x), (x.float() @ weight.float().t()).to(BF16))


# --- what was measured ---


def profile_of(times: dict[tuple[str, int], float], dtype: str = "bfloat16") -> ProductProfile:
    """Of one width; `times` in ms by form and number of rows."""
    rows = tuple(ProductTime(64, 256, num_rows, form, ms) for (form, num_rows), ms in times.items())
    return ProductProfile(this_cpu(), torch.get_num_threads(), dtype, 20.0, 80.0, 0.0, rows)


AVX2 = {
    ("stream", 1): 1.0, ("stream", 8): 2.0, ("stream", 16): 4.0, ("stream", 32): 9.0,
    ("panels", 1): 5.0, ("panels", 8): 5.0, ("panels", 16): 5.0, ("panels", 32): 6.0,
    ("panels", MANY_ROWS): 20.0,
    ("packed", 1): 2.0, ("packed", 8): 9.0, ("packed", 16): 18.0, ("packed", 32): 40.0,
}  # fmt: skip


def test_the_faster_form_serves_up_to_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    has_instructions(monkeypatch, bf16=False, f16=False)
    forms = profile_of(AVX2).forms()
    assert forms == {64: Forms(is_packed=False, max_stream_rows=16)}
    assert [str(each) for each in (forms[64], PANELS, Forms(is_packed=True))] == [
        "stream up to 16 rows, then panels", "panels", "packed",
    ]  # fmt: skip
    use_measured(BF16, forms)
    assert [forms_for(BF16, width).max_stream_rows for width in (64, 4096)] == [16, 16]
    assert forms_for(F16, 64).max_stream_rows == MAX_STREAM_ROWS
    use_measured(BF16, {})
    assert forms_for(BF16, 64) == Forms(is_packed=False, max_stream_rows=MAX_STREAM_ROWS)


@pytest.mark.parametrize(("is_native", "factor", "is_packed"), [
    (True, 1.0, True), (True, 1.2, True), (True, 1.5, False),
    (False, 1.0, False), (False, 0.9, False), (False, 0.6, True),
])  # fmt: skip
def test_the_expected_form_gives_way_to_one_that_is_clearly_faster(
    is_native: bool, factor: float, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`factor`: what packed weights take over what others take."""
    has_instructions(monkeypatch, bf16=is_native, f16=False)
    times = {("panels", rows): 1.0 for rows in (1, 8, MANY_ROWS)}
    times |= {("packed", rows): factor for rows in (1, 8, MANY_ROWS)}
    assert profile_of(times).forms()[64].is_packed is is_packed


def test_the_table_names_form_and_share_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    has_instructions(monkeypatch, bf16=False, f16=False)
    read_ms, sgemm_ms = 64 * 256 * 2 / 20e6, 2 * MANY_ROWS * 64 * 256 / 80e6
    times = {("stream", 1): 2 * read_ms, ("panels", MANY_ROWS): 1.25 * sgemm_ms, ("panels", 1): 9 * read_ms}
    head, _, *lines = profile_of(times).table()
    assert "20.0 GB/s" in head
    assert [line.split()[1:3] + line.split()[4:] for line in lines] == [
        ["1", "stream", "50%", "read"],
        [str(MANY_ROWS), "panels", "80%", "sgemm"],
    ]


def test_a_profile_holds_for_what_it_was_measured_on(tmp_path: Path) -> None:
    profile, path = profile_of(AVX2), tmp_path / "products.json"
    assert ProductProfile.read(path) is None
    profile.write(path)
    assert ProductProfile.read(path) == profile
    assert profile.holds_here(BF16, {64: 256})
    assert not profile.holds_here(F16, {64: 256})
    assert not profile.holds_here(BF16, {64: 256, 128: 64})
    for change in ({"cpu": "another"}, {"num_threads": 999}):
        assert not dataclasses.replace(profile, **change).holds_here(BF16, {64: 256})
    path.write_text('{"cpu": 1}')
    assert ProductProfile.read(path) is None


def test_measuring_times_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_profile, "_READ_BYTES", 2**12)
    monkeypatch.setattr(product_profile, "_READ_ELEMENTS", 2**12)
    monkeypatch.setattr(product_profile, "_SGEMM", (8, 8, 8))
    monkeypatch.setattr(product_profile, "_HOPELESS", float("inf"))
    monkeypatch.setattr(product_profile, "_waited_s", lambda: 0.0)
    profile = product_profile.measure(BF16, {32: 48, 64: 40})
    assert {(t.num_in, t.num_out) for t in profile.times} == {(32, 48), (64, 40)}
    counts = {form: [t.num_rows for t in profile.times if t.form == form and t.num_in == 32] for form in
              ("stream", "panels", "packed")}  # fmt: skip
    many, few = list(product_profile.ROWS), list(product_profile.ROWS[:-1])
    assert counts == {"stream": few, "panels": many, "packed": many if linear.packed_reason(BF16)[0] else []}
    assert set(profile.forms()) == {32, 64}
    assert len(profile.table()) == 2 + 2 * len(product_profile.ROWS)


def test_a_measurement_that_other_work_disturbed_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    waited_s = iter([3.0, 3.5])
    monkeypatch.setattr(product_profile, "_waited_s", lambda: next(waited_s))
    monkeypatch.setattr(product_profile._Watch, "_elapsed_s", property(lambda watch: 2.0))
    profile = dataclasses.replace(profile_of(AVX2), waited=product_profile._Watch().waited)
    assert profile.waited == 0.25
    assert profile.is_disturbed
    assert not profile_of(AVX2).is_disturbed


def test_one_disturbed_time_does_not_end_the_use_of_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    has_instructions(monkeypatch, bf16=False, f16=False)
    assert profile_of(AVX2 | {("stream", 1): 6.0}).forms()[64].max_stream_rows == 16


@pytest.mark.parametrize("num_rows", [1, 7, 40])
def test_wide_results_are_not_rounded(num_rows: int) -> None:
    weight, x = torch.randn(50, 64).to(BF16), torch.randn(num_rows, 64).to(BF16)
    linear_ = Linear(weight, forms=Forms(is_packed=False, max_stream_rows=16))
    y = linear_(x, is_wide=True)
    assert y.dtype == torch.float32
    if products.is_widened(weight) or num_rows <= 16:
        torch.testing.assert_close(y, x.float() @ weight.float().t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear_(x), y.to(BF16))


def test_limit_and_times_are_of_the_same_kind_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        product_profile, "use_huge_pages", lambda spans: asked.append(sum(b - a for a, b in spans))
    )
    for name, value in (("_READ_BYTES", 2**13), ("_READ_ELEMENTS", 2**10), ("_SGEMM", (8, 8, 8))):
        monkeypatch.setattr(product_profile, name, value)
    monkeypatch.setattr(product_profile, "_waited_s", lambda: 0.0)
    forms = {t.form for t in product_profile.measure(BF16, {32: 64}).times}
    assert asked[0] == 2**12  # what is read, in float32
    assert len(asked) == 1 + len(forms)
    assert min(asked[1:]) >= 2**13
