"""Step costs on running sums are the performance model's own predictions."""

import random

import numpy as np
import pytest

from tests.sim.builders import EXTENDED, PUBLISHED
from toppings.cluster.batch_row import BatchRow
from toppings.cluster.batch_sums import BatchSums
from toppings.cluster.perf_model import PerfModel, batch_features
from toppings.core import BatchItem
from toppings.sampling_params import SamplingParams
from toppings.sim.costs import StepCosts, to_ns
from toppings.sim.request import SimRequest
from toppings.sim.settings import base_tpt_ms, parse_slo_ms


def make_request(rng: random.Random, *, num_computed: int) -> SimRequest:
    adapter = rng.randrange(5)
    rank = (8, 16, 32, 64, 8)[adapter]
    prompt = [0] * (num_computed + 100)
    return SimRequest("r", prompt, SamplingParams(), adapter, num_computed_tokens=num_computed, rank=rank)


@pytest.mark.parametrize("model", [PUBLISHED, EXTENDED], ids=["published", "extended"])
@pytest.mark.parametrize(("num_decodes", "num_prefills"), [(1, 0), (7, 0), (0, 1), (0, 3), (5, 2)])
def test_a_step_takes_what_the_performance_model_predicts(
    model: PerfModel, num_decodes: int, num_prefills: int
) -> None:
    rng = random.Random(0)
    decodes = [make_request(rng, num_computed=rng.randrange(1, 500)) for _ in range(num_decodes)]
    prefills = [
        (make_request(rng, num_computed=rng.randrange(50)), rng.randrange(1, 90)) for _ in range(num_prefills)
    ]
    costs, sums = StepCosts(model), BatchSums()
    for request in decodes:
        sums.add(request.rank, request.adapter_id, 1, 0)
    context = sum(request.num_computed_tokens + 1 for request in decodes)
    ms = costs.decode_ms(sums) + costs.decode_context_ms * context
    if prefills:
        ms += costs.prefill_ms([BatchItem(*prefill) for prefill in prefills])
    if decodes and prefills:
        ms -= costs.shared_ms
    expected = model.step_ms(
        decode=_features([(request, 1) for request in decodes]), prefill=_features(prefills)
    )
    assert ms == pytest.approx(expected, rel=1e-12)


def _features(rows: list[tuple[SimRequest, int]]) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    return batch_features(
        BatchRow(request.rank, str(request.adapter_id), num_tokens, request.num_computed_tokens)
        for request, num_tokens in rows
    )


def test_what_is_removed_from_the_sums_leaves_no_trace() -> None:
    rng = random.Random(1)
    requests = [make_request(rng, num_computed=1) for _ in range(20)]
    sums = BatchSums()
    for request in requests:
        sums.add(request.rank, request.adapter_id, 1, 0)
    rng.shuffle(requests)
    for request in requests:
        sums.remove(request.rank, request.adapter_id, 1, 0)
    assert sums == BatchSums()


def test_no_step_takes_less_than_a_nanosecond() -> None:
    assert [to_ns(ms) for ms in (-1.0, 0.0, 35.8)] == [1, 1, 35_800_000]


@pytest.mark.parametrize(("text", "slo_ms"), [("50", 50.0), ("1.5x", 1.5 * 33.5), ("none", float("inf"))])
def test_an_slo_is_ms_or_a_multiple_of_the_base_models_step(text: str, slo_ms: float) -> None:
    assert base_tpt_ms(PUBLISHED) == pytest.approx(33.5)
    assert parse_slo_ms(text, PUBLISHED) == pytest.approx(slo_ms)


@pytest.mark.parametrize("text", ["fast", "0", "-1x", "nan", "inf"])
def test_a_text_that_is_no_slo_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="slo is"):
        parse_slo_ms(text, PUBLISHED)
