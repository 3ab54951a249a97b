"""Each published format is read, recognized, and a bad row is named by file and line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.sim.builders import make_trace
from toppings.sim.assign import TraceOptions
from toppings.sim.readers import detect_format, load_trace
from toppings.sim.readers.azure_functions_2019 import read_counts
from toppings.sim.synth.workload import Workload
from toppings.sim.trace import Tenants, TraceError, write_trace

MINUTES = 5
FUNCTIONS_2019 = "HashOwner,HashApp,HashFunction,Trigger," + ",".join(str(m + 1) for m in range(MINUTES))
SAMPLES = {
    "toppings": (
        "arrival_s,adapter,rank,prompt_tokens,response_tokens\n1.5,b,16,10,3\n0.25,a,8,7,2\n1.5,a,8,1,1\n"
    ),
    "azure-functions-2019": (
        f"{FUNCTIONS_2019}\no,a,f,http,0,3,0,0,1\no,a,g,timer,1,1,1,1,1\no,b,h,queue,0,0,0,0,0\n"
    ),
    "azure-functions-2021": (
        "app,func,end_timestamp,duration\nx,f,10.0,4.0\nx,g,5.0,0.5\ny,f,9.0,1.0\nx,f,20.0,1.0\n"
    ),
    "azure-llm": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
    ),
    "burstgpt": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,100,0,100,API log\n118,ChatGPT,5,7,12,API log\n"
    ),
    "mooncake": (
        '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n'
        '{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46]}\n'
    ),
}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", SAMPLES)
def test_the_format_is_recognized_by_its_first_line(tmp_path: Path, name: str) -> None:
    assert detect_format(write(tmp_path, SAMPLES[name])) == name


def test_a_file_of_no_known_format_is_refused_with_its_first_line(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"trace\.txt:1: 'when,what' begins no trace format"):
        load_trace(write(tmp_path, "when,what\n1,2\n"))


def test_our_own_format_is_sorted_by_arrival_and_keeps_names_and_ranks(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, SAMPLES["toppings"]))
    assert trace.arrivals_s.tolist() == [0.25, 1.5, 1.5]
    assert [trace.adapter_names[a] for a in trace.adapters] == ["a", "b", "a"]
    assert trace.ranks[trace.adapters].tolist() == [8, 16, 8]
    assert trace.prompt_tokens.tolist() == [7, 10, 1]


def test_a_written_trace_is_read_back_the_same(tmp_path: Path) -> None:
    trace = Workload(rate=20.0, duration_s=30.0, num_adapters=5).make_trace(3)
    write_trace(trace, tmp_path / "t.csv")
    again = load_trace(tmp_path / "t.csv")
    assert np.allclose(again.arrivals_s, trace.arrivals_s, rtol=0, atol=1e-9)
    assert again.response_tokens.tolist() == trace.response_tokens.tolist()
    assert again.ranks[again.adapters].tolist() == trace.ranks[trace.adapters].tolist()
    names = [trace.adapter_names[a] for a in trace.adapters]
    assert [again.adapter_names[a] for a in again.adapters] == names


def test_a_written_trace_keeps_its_tenants(tmp_path: Path) -> None:
    trace = make_trace([0.0, 1.0, 2.0])
    trace = replace(trace, tenants=Tenants(np.array([0, 1, 0], dtype=np.int32), ("a", "b"), (1.0, 2.5)))
    write_trace(trace, tmp_path / "t.csv")
    read = load_trace(tmp_path / "t.csv")
    assert read.tenants is not None
    assert read.tenants.indices.tolist() == [0, 1, 0]
    assert (list(read.tenants.names), list(read.tenants.weights)) == (["a", "b"], [1.0, 2.5])


@pytest.mark.parametrize(("weight", "reason"), [("0", "must be above 0"), ("2", "another weight")])
def test_a_tenant_has_one_weight_above_0(tmp_path: Path, weight: str, reason: str) -> None:
    path = tmp_path / "t.csv"
    head = "arrival_s,adapter,rank,prompt_tokens,response_tokens,tenant,weight"
    path.write_text(f"{head}\n0,x,8,1,1,a,1\n1,x,8,1,1,a,{weight}\n")
    with pytest.raises(TraceError, match=reason):
        load_trace(path)


def test_azure_functions_2019_counts_fall_into_their_minutes(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, SAMPLES["azure-functions-2019"]))
    minutes = (trace.arrivals_s // 60).astype(int)
    assert np.bincount(minutes[trace.adapters == 0], minlength=MINUTES).tolist() == [0, 3, 0, 0, 1]
    assert np.bincount(minutes[trace.adapters == 1], minlength=MINUTES).tolist() == [1, 1, 1, 1, 1]
    assert (trace.duration_s, len(trace.ranks)) == (300.0, 3)


def test_azure_functions_2019_counts_are_thinned_to_a_rate(tmp_path: Path) -> None:
    rows = "".join(f"o,a,f{i},http{',1000' * MINUTES}\n" for i in range(20))
    trace = load_trace(write(tmp_path, f"{FUNCTIONS_2019}\n{rows}"), TraceOptions(rate=30.0))
    # 9,000 expected, standard deviation 95: outside of 4.5 deviations once in 150,000 seeds
    assert abs(len(trace) - 9000) < 430


def test_only_the_minutes_of_the_window_are_taken(tmp_path: Path) -> None:
    options = TraceOptions(start_s=60.0, duration_s=60.0)
    trace = load_trace(write(tmp_path, SAMPLES["azure-functions-2019"]), options)
    assert (len(trace), trace.duration_s) == (4, 60.0)
    assert trace.arrivals_s.max() < 60.0


def test_many_functions_are_read_into_one_compact_array(tmp_path: Path) -> None:
    rows = "".join(f"o,a,f{i},http,{i},0,0,0,7\n" for i in range(5000))
    counts = read_counts(write(tmp_path, f"{FUNCTIONS_2019}\n{rows}"))
    assert counts.shape == (5000, MINUTES)
    assert counts.itemsize == 4
    assert counts[4321].tolist() == [4321, 0, 0, 0, 7]


def test_azure_functions_2021_invocations_arrive_when_they_began(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, SAMPLES["azure-functions-2021"]))
    assert trace.arrivals_s.tolist() == [0.0, 1.5, 3.5, 14.5]
    assert len(set(trace.adapters[[0, 1, 2]].tolist())) == 3  # x/g, x/f, y/f
    assert trace.adapters[1] == trace.adapters[3]


def test_azure_llm_times_keep_their_seven_decimals(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, SAMPLES["azure-llm"]))
    assert trace.arrivals_s.tolist() == [0.0, 0.052]
    assert (trace.prompt_tokens.tolist(), trace.response_tokens.tolist()) == ([4808, 3180], [10, 8])


def test_azure_llm_2024_times_with_an_offset_of_zero_are_read(tmp_path: Path) -> None:
    rows = "2024-05-10 00:00:00.5+00:00,5,1\n2024-05-10 00:00:02+00:00,6,1\n"
    header = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    assert load_trace(write(tmp_path, header + rows)).arrivals_s.tolist() == [0.0, 1.5]


def test_burstgpt_failures_are_left_out_and_counted(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, SAMPLES["burstgpt"]))
    assert (trace.arrivals_s.tolist(), trace.num_dropped) == ([0.0, 113.0], 1)


def test_mooncake_times_are_milliseconds(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, SAMPLES["mooncake"]))
    assert trace.arrivals_s.tolist() == pytest.approx([0.0, 3.053])
    assert trace.prompt_tokens.tolist() == [6955, 6472]


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("toppings", "2.0,a,8,x,1", "prompt_tokens is 'x'; it must be a whole number"),
        ("toppings", "2.0,a,8,1,0", "response_tokens is 0"),
        ("toppings", "-2.0,a,8,1,1", "arrival_s is '-2.0'; it must be a number, at least 0"),
        ("toppings", "nan,a,8,1,1", "arrival_s is 'nan'"),
        ("toppings", "2.0,,8,1,1", "adapter is ''; it must be a name"),
        ("toppings", "2.0,a,64,1,1", "another rank than in its first row"),
        ("toppings", "2.0,a,8,1", "the row has 4 fields; the header has 5"),
        ("azure-functions-2019", "o,a,f,http,1,2,x,4,5", "a count is no whole number"),
        ("azure-functions-2019", "o,a,f,http,1,2,3,4", "the row has 4 counts; the header has 5 minutes"),
        ("azure-functions-2019", "o,a,f,http,1,2,-3,4,5", "counts are -3"),
        ("azure-functions-2021", "x,f,later,1.0", "end_timestamp is 'later'"),
        ("azure-llm", "yesterday,1,1", "TIMESTAMP is 'yesterday'; it must be a time in UTC"),
        ("azure-llm", "2023-11-16 18:17:03+02:00,1,1", "it must be a time in UTC"),
        ("burstgpt", "5,m,-1,1,1,API log", "Request tokens is '-1'"),
        ("mooncake", '{"timestamp": 1, "input_length": 5}', "output_length"),
        ("mooncake", '{"timestamp": 1, "input_length": 5, "output_length": -2}', "output_length is -2"),
        ("mooncake", "not json", "malformed"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, name: str, row: str, reason: str) -> None:
    path = write(tmp_path, SAMPLES[name] + row + "\n")
    line = SAMPLES[name].count("\n") + 1
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert reason in str(caught.value)


def test_a_bad_row_beyond_the_first_chunk_has_its_own_line(tmp_path: Path) -> None:
    rows = ["arrival_s,adapter,rank,prompt_tokens,response_tokens", *["1,a,8,1,1"] * 70_000, "1,a,8,1,?"]
    with pytest.raises(TraceError, match=r":70002: response_tokens is '\?'"):
        load_trace(write(tmp_path, "\n".join(rows)))


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - {"mooncake"}))
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TraceError, match=":2: the file has no rows"):
        load_trace(write(tmp_path, SAMPLES[name].split("\n")[0] + "\n"))


def test_a_named_format_must_have_its_columns(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=":1: the header has no column 'app'"):
        load_trace(write(tmp_path, SAMPLES["burstgpt"]), format_name="azure-functions-2021")


def test_an_unknown_format_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown trace format 'parquet'; choose one of auto, toppings"):
        load_trace(write(tmp_path, SAMPLES["burstgpt"]), format_name="parquet")


def test_functions_are_dealt_evenly_to_fewer_adapters(tmp_path: Path) -> None:
    rows = "".join(f"o,a,f{i},http,1,0,0,0,0\n" for i in range(100))
    trace = load_trace(write(tmp_path, f"{FUNCTIONS_2019}\n{rows}"), TraceOptions(num_adapters=8))
    assert sorted(np.bincount(trace.adapters).tolist()) == [12, 12, 12, 12, 13, 13, 13, 13]


def test_the_same_seed_assigns_the_same_adapters_and_another_seed_others(tmp_path: Path) -> None:
    path = write(
        tmp_path, "\n".join([SAMPLES["azure-llm"].split("\n")[0], *["2023-11-16 18:17:03,5,5"] * 50])
    )
    first, again, other = (load_trace(path, TraceOptions(seed=seed)).adapters.tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_ranks_are_dealt_in_equal_shares(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, SAMPLES["azure-llm"]), TraceOptions(num_adapters=40, ranks=(8, 64)))
    assert np.bincount(trace.ranks)[[8, 64]].tolist() == [20, 20]


def test_a_recorded_trace_is_stretched_to_a_rate_with_its_bursts(tmp_path: Path) -> None:
    trace = load_trace(write(tmp_path, SAMPLES["mooncake"]), TraceOptions(rate=100.0))
    assert trace.rate == pytest.approx(100.0)
    assert trace.arrivals_s.tolist() == pytest.approx([0.0, 0.02])


def test_a_window_after_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not within the trace's"):
        load_trace(write(tmp_path, SAMPLES["mooncake"]), TraceOptions(start_s=100.0))


def test_a_day_that_is_too_large_asks_for_a_rate(tmp_path: Path) -> None:
    path = write(tmp_path, f"{FUNCTIONS_2019}\no,a,f,http{',100000000' * MINUTES}\n")
    with pytest.raises(ValueError, match=r"500,000,000 requests.*lower rate or a shorter window"):
        load_trace(path)
