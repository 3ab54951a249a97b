"""The running sums of a fleet against a recount, and the views that policies get."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toppings.cluster.batch_row import BatchRow
from toppings.cluster.fleet import Fleet
from toppings.cluster.instances import DECODE, PREFILL
from toppings.cluster.perf_model import batch_features, load_perf_model
from toppings.cluster.snapshot import InstanceSnapshot, RequestSnapshot

MODEL = load_perf_model("published")


def request(request_id: str, rank: int = 8, tokens: int = 10, adapter: str | None = "a") -> RequestSnapshot:
    return RequestSnapshot(request_id, adapter, rank, tokens, 20.0)


def make_fleet(*ids: str) -> Fleet:
    return Fleet(InstanceSnapshot(instance_id=instance_id, perf_model=MODEL) for instance_id in ids)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["enqueue", "start", "grow", "finish"]),
        st.integers(0, 2),
        st.integers(0, 9),
        st.sampled_from([0, 8, 16, 64]),
        st.integers(0, 300),
    ),
    max_size=60,
)


@settings(max_examples=60)
@given(STEPS)
def test_sums_equal_a_recount_after_any_history(steps: list[tuple[str, int, int, int, int]]) -> None:
    fleet = make_fleet("x", "y", "z")
    where: dict[str, tuple[str, bool]] = {}  # request -> instance, whether it runs
    for action, row, number, rank, tokens in steps:
        name, instance_id = f"r{number}", fleet.ids[row]
        if action == "enqueue" and name not in where:
            fleet.enqueue(instance_id, request(name, rank, tokens, f"a{rank}" if rank else None))
            where[name] = (instance_id, False)
        elif name in where and action == "start" and not where[name][1]:
            fleet.start(where[name][0], name)
            where[name] = (where[name][0], True)
        elif name in where and action == "grow" and where[name][1]:
            fleet.grow(where[name][0], name, tokens)
        elif name in where and action == "finish":
            fleet.finish(where.pop(name)[0], name)
    fleet.check_integrity()
    for name, (instance_id, _) in where.items():
        fleet.finish(instance_id, name)
    assert not fleet.batches.any()
    assert not fleet.max_ranks.any()


def test_features_are_those_of_the_batch() -> None:
    fleet = make_fleet("x")
    requests = [request("1", 8, 10, "a"), request("2", 64, 20, "b"), request("3", 64, 30, "b")]
    for each in requests:
        fleet.enqueue("x", each)
    fleet.start("x", "3")
    decode = [BatchRow(r.rank, r.adapter, num_context=r.prompt_tokens - 1) for r in requests]
    prefill = [BatchRow(r.rank, r.adapter, num_tokens=r.prompt_tokens) for r in requests[:2]]
    assert fleet.batches[DECODE, :, 0].tolist() == batch_features(decode).tolist()
    assert fleet.batches[PREFILL, :, 0].tolist() == batch_features(prefill).tolist()


@pytest.mark.parametrize(
    "new", [request("n", 16, 50, "c"), request("n", 64, 7, "b"), request("n", 0, 5, None)]
)
def test_prediction_with_a_request_is_that_of_the_batch_with_it(new: RequestSnapshot) -> None:
    fleet = make_fleet("x", "y")
    fleet.models[:] = np.arange(1.0, 17.0).reshape(2, 8, 1)
    fleet.uses_distinct_ranks = True
    for each in (request("1", 8, 10, "a"), request("2", 64, 20, "b")):
        fleet.enqueue("x", each)
    predicted = fleet.step_ms_with(new)
    for each in (new, RequestSnapshot("m", new.adapter, new.rank, new.prompt_tokens, 1.0)):
        fleet.enqueue("x" if each is new else "y", each)
    assert predicted == pytest.approx(fleet.step_ms())


def test_frozen_copy_does_not_follow() -> None:
    fleet = make_fleet("x")
    kept = fleet.frozen()
    fleet.enqueue("x", request("1"))
    assert (kept.num_requests[0], kept.queued, kept.active) == (0, [{}], [{}])
    assert fleet.num_requests[0] == 1


def test_taken_instances_are_numbered_anew() -> None:
    fleet = make_fleet("x", "y", "z")
    fleet.enqueue("z", request("1"))
    taken = fleet.take(np.array([2, 0]))
    assert taken.ids == ["z", "x"]
    assert taken.num_requests.tolist() == [1, 0]


def test_rows_move_up_when_an_instance_leaves() -> None:
    fleet = make_fleet("x", "y", "z")
    fleet.enqueue("z", request("1"))
    fleet.remove_instance("x")
    fleet.enqueue("z", request("2"))
    assert fleet.num_requests.tolist() == [0, 2]
    fleet.check_integrity()


def test_room_is_what_is_left_of_the_cache_and_the_sequences() -> None:
    fleet = make_fleet("x", "y", "z")
    fleet.set_limits("x", kv_tokens_total=100.0, kv_tokens_used=71.0)
    fleet.set_limits("y", kv_tokens_total=100.0, kv_tokens_used=70.0)
    fleet.set_limits("z", max_num_seqs=1.0)
    fleet.enqueue("z", request("1"))
    assert fleet.has_room(request("2", tokens=10)).tolist() == [False, True, False]


def test_same_request_twice_is_refused() -> None:
    fleet = make_fleet("x")
    fleet.enqueue("x", request("1"))
    with pytest.raises(ValueError, match="request '1' is on instance 'x' already"):
        fleet.enqueue("x", request("1"))
    with pytest.raises(ValueError, match="instance 'x' is in the fleet already"):
        fleet.add_instance(InstanceSnapshot(instance_id="x", perf_model=MODEL))
