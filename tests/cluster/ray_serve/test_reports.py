from dataclasses import replace

import msgspec

from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.ray_serve.messages import ReplicaReport
from toppings.cluster.ray_serve.reports import describe, merge_stats
from toppings.cluster.report import RequestEntry, ServerReport, read_report
from toppings.messages import AdapterStatus, EngineReady, EngineStats
from toppings.server.report import make_report

INFO = EngineReady(
    model_name="base",
    max_model_len=64,
    max_num_seqs=8,
    vocab_size=256,
    page_size=16,
    num_pages=32,
    device_pool_bytes=1000,
    host_store_bytes=1000,
)
STATS = EngineStats(
    call_id=7,
    num_running=2,
    num_waiting=1,
    kv_pages_used=4,
    kv_pages_total=32,
    page_size=16,
    host_bytes_used=100,
    host_bytes_total=1000,
    device_bytes_used=100,
    device_bytes_total=1000,
    adapters=[],
    running_ranks=[8, 0],
    waiting_ranks=[16],
    waiting_tokens=5,
    context_tokens=40,
    counters={"steps": 3.0},
)


def status(adapter_id: int, *, layers: int = 2, is_on_host: bool = True, running: int = 0) -> AdapterStatus:
    return AdapterStatus(
        adapter_id=adapter_id,
        is_on_host=is_on_host,
        device_layers=layers,
        num_layers=2,
        num_running=running,
        num_waiting=0,
        num_hits=1,
        is_pinned=False,
    )


def test_a_replica_tells_its_room_its_adapters_and_its_requests() -> None:
    stats = replace(STATS, adapters=[status(1), status(2, layers=1), status(3, layers=0, is_on_host=False)])
    entry = RequestEntry("front-1", "one", 8, 12, 3)
    told = make_report(stats, INFO, {1: "one", 2: "two", 3: "three"}.__getitem__, None, [entry])
    assert (told.kv_tokens_total, told.kv_tokens_used, told.max_num_seqs) == (512.0, 64.0, 8.0)
    assert (told.on_device, told.on_host) == ({"one"}, {"one", "two"})
    assert told.requests == [entry]


def test_what_is_told_survives_the_way_through_serve_and_through_json() -> None:
    entry, model = RequestEntry("front-1", None, 0, 12, 3), load_perf_model("published")
    told = make_report(replace(STATS, adapters=[status(1)]), INFO, str, model, [entry])
    plain = msgspec.to_builtins(told)
    assert isinstance(plain, dict)
    for arrived in (msgspec.convert(plain, ServerReport), read_report(msgspec.json.encode(told))):
        assert msgspec.to_builtins(arrived) == plain
        assert arrived.read_perf_model() == model


def test_all_replicas_are_shown_as_one_engine() -> None:
    first = ReplicaReport("a", "n", STATS, [("one", status(5, running=1)), ("gone", status(9))])
    second = ReplicaReport("b", "n", STATS, [("one", status(3, layers=0, running=2)), ("two", status(4))])
    merged = merge_stats([first, second], {"one": 1, "two": 2}.get)
    assert (merged.num_running, merged.num_waiting) == (4, 2)
    assert (merged.kv_pages_used, merged.kv_pages_total, merged.page_size) == (8, 64, 16)
    assert merged.running_ranks == [8, 0, 8, 0]
    assert merged.counters == {"steps": 6.0}
    one, two = merged.adapters
    assert (one.adapter_id, one.device_layers, one.num_running, one.num_hits) == (1, 2, 3, 2)
    assert two.adapter_id == 2


def test_without_replicas_there_is_nothing_to_tell() -> None:
    merged = merge_stats([], lambda name: None)
    assert (merged.num_running, merged.kv_pages_total, merged.adapters) == (0, 0, [])


def test_a_replicas_row_names_the_adapters_on_its_device() -> None:
    row = describe(ReplicaReport("a", "n", STATS, [("two", status(4)), ("one", status(5, layers=1))]))
    assert (row["id"], row["num_running"], row["ranks"]) == ("a", 2, [0, 8, 16])
    assert row["adapters_on_device"] == ["two"]
    assert row["adapters_on_host"] == ["one", "two"]
