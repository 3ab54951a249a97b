"""Linear models of step times: features, fitting, files."""

from pathlib import Path

import numpy as np
import pytest

from toppings.cluster.batch_row import BatchRow
from toppings.cluster.fitting import Observation, fit_linear, fit_perf_model
from toppings.cluster.perf_model import (
    FEATURES,
    GATHERED_TOKENS,
    LinearModel,
    PerfModel,
    batch_features,
    load_perf_model,
)

TRUE = LinearModel(
    {"steps": 20.0, "tokens": 0.3, "rank_sum": 0.004, "distinct_rank_sum": 0.01, "context_tokens": 0.002}
)


def make_steps(count: int, *, is_prefill: bool, noise: float = 0.0, seed: int = 0) -> list[Observation]:
    generator = np.random.default_rng(seed)
    steps = []
    for _ in range(count):
        rows = tuple(
            BatchRow(
                rank=int(generator.choice([0, 8, 16, 32, 64])),
                adapter=f"a{generator.integers(6)}",
                num_tokens=int(generator.integers(8, 512)) if is_prefill else 1,
                num_context=0 if is_prefill else int(generator.integers(16, 1024)),
            )
            for _ in range(generator.integers(1, 4 if is_prefill else 32))
        )
        steps.append(Observation(rows, TRUE.predict_batch(rows) * (1 + noise * generator.standard_normal())))
    return steps


def test_decode_features_are_those_of_the_published_forms() -> None:
    rows = [BatchRow(8, "a", num_context=9), BatchRow(64, "b", num_context=4), BatchRow(64, "b")]
    assert dict(zip(FEATURES, batch_features(rows), strict=True)) == {
        "steps": 1,
        "tokens": 3,
        "padded_ranks": 3 * 64,
        "rank_sum": 8 + 64 + 64,
        "distinct_rank_sum": 8 + 64,
        "context_tokens": 10 + 5 + 1,
        "sequences": 3,
        "gathered_tokens": 0,
    }


def test_prefill_rows_attend_causally() -> None:
    assert BatchRow(8, num_tokens=4).num_attended == 1 + 2 + 3 + 4
    assert BatchRow(8, num_tokens=2, num_context=10).num_attended == 11 + 12


def test_only_chunks_that_continue_a_prompt_gather_what_is_cached() -> None:
    rows = [BatchRow(8, num_tokens=4, num_context=100), BatchRow(8, num_tokens=4), BatchRow(8, num_context=9)]
    assert batch_features(rows)[GATHERED_TOKENS] == 100


def test_nothing_costs_nothing() -> None:
    assert TRUE.predict_batch([]) == 0


def test_fit_finds_the_true_coefficients() -> None:
    model = fit_perf_model(
        make_steps(200, is_prefill=False), make_steps(200, is_prefill=True), origin="made up"
    )
    assert model.decode_form == model.prefill_form == "extended"
    for form in (model.decode, model.prefill):
        assert form.fit is not None
        assert form.fit.r2 == pytest.approx(1.0)
        assert form.vector == pytest.approx(TRUE.vector, abs=1e-6)


def test_fit_is_judged_on_batches_it_has_not_seen() -> None:
    """With as many noisy batches as features, the fit is perfect and the prediction is not."""
    model = fit_perf_model(
        make_steps(8, is_prefill=False, noise=0.3),
        make_steps(8, is_prefill=True, noise=0.3),
        origin="made up",
    )
    report = model.decode_forms["extended"].fit
    assert report is not None
    assert (report.num_fitted, report.num_held_out) == (6, 2)
    assert report.mean_relative_error > 0.01


def test_every_published_form_is_reported_beside_the_best() -> None:
    model = fit_perf_model(
        make_steps(100, is_prefill=False), make_steps(100, is_prefill=True), origin="made up"
    )
    assert set(model.decode_forms) == {"bgmv", "mbgmv", "extended"}
    assert all(form.fit is not None for form in model.decode_forms.values())
    assert model.decode_forms["mbgmv"].fit.r2 < model.decode_forms["extended"].fit.r2  # type: ignore[union-attr]


def test_non_negative_fit_is_no_worse_than_any_other_non_negative_one() -> None:
    generator = np.random.default_rng(3)
    features = generator.random((60, len(FEATURES)))
    ms = features @ np.array([3.0, -2.0, 1.0, -0.5, 0.0, 2.0, -1.0, 0.5]) + generator.standard_normal(60)
    model = fit_linear(features, ms, FEATURES)
    assert (model.vector >= 0).all()
    gradient = features.T @ (features @ model.vector - ms)
    assert (gradient[model.vector == 0] >= -1e-8).all()  # the optimum's conditions (Karush, Kuhn, Tucker)
    assert gradient[model.vector > 0] == pytest.approx(0, abs=1e-8)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="7 decode steps to fit; at least 8"):
        fit_perf_model(make_steps(7, is_prefill=False), make_steps(8, is_prefill=True), origin="made up")


def test_model_survives_its_file(tmp_path: Path) -> None:
    model = fit_perf_model(
        make_steps(20, is_prefill=False), make_steps(20, is_prefill=True), origin="made up"
    )
    file = tmp_path / "model.json"
    file.write_text(model.to_json())
    assert load_perf_model(str(file)) == model
    assert load_perf_model(f"{file}:bgmv").decode_form == "bgmv"


def test_published_points_are_met() -> None:
    model = load_perf_model("published")
    bgmv, mbgmv = model.decode, model.using("mbgmv").decode
    few, many = [BatchRow(64)] * 16, [BatchRow(32)] * 24
    assert [bgmv.predict_batch(many), bgmv.predict_batch(few)] == pytest.approx([34.8, 35.8], abs=0.05)
    assert [mbgmv.predict_batch(many), mbgmv.predict_batch(few)] == pytest.approx([35.3, 35.9], abs=0.1)
    prefill = [model.prefill.predict_batch([BatchRow(32, num_tokens=n)]) for n in (256, 1024)]
    assert prefill == pytest.approx([44, 90], abs=0.2)
    assert "two published points" in model.origin


def test_mixed_step_pays_its_fixed_cost_once() -> None:
    model = load_perf_model("published")
    decode, prefill = batch_features([BatchRow(8)] * 4), batch_features([BatchRow(8, num_tokens=100)])
    nothing = batch_features([])
    apart = model.step_ms(decode=decode, prefill=nothing) + model.step_ms(decode=nothing, prefill=prefill)
    assert model.step_ms(decode=decode, prefill=prefill) == pytest.approx(apart - 28.7)


def test_load_time_is_bytes_over_the_links() -> None:
    model = PerfModel("x", {"a": TRUE}, {"a": TRUE}, "a", "a", link_gbps=10.0, disk_gbps=1.0)
    assert model.load_ms(100e6, is_on_host=True) == pytest.approx(10)
    assert model.load_ms(100e6, is_on_host=False) == pytest.approx(110)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "missing required field `origin`"),
        ("{nonsense", "JSON is malformed"),
        (
            '{"origin":"x","decode_forms":{"a":{"coefficients":{"speed":1}}},"prefill_forms":{},'
            '"decode_form":"a","prefill_form":"a"}',
            "unknown feature 'speed'",
        ),
    ],
)
def test_bad_file_is_named_with_its_fault(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_perf_model(str(file))
    assert str(file) in str(raised.value)


def test_unknown_model_and_form_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot read performance model 'nowhere'"):
        load_perf_model("nowhere")
    with pytest.raises(ValueError, match="decode form 'fast' is not in the model; it has bgmv, mbgmv"):
        load_perf_model("published:fast")
