import json
from pathlib import Path
from typing import Any

import pytest

from toppings.lab.modes.report import LoggedStep, read_report, summarize_steps


def _write(logs: Path, mode: str, records: list[dict[str, Any]], link_gbps: float | None = None) -> Path:
    directory = logs / mode
    directory.mkdir(parents=True)
    file = directory / "steps.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    if link_gbps is not None:
        (directory / "config.yaml").write_text(f"link_gbps: {link_gbps}\n")
    return file


def _record(kind: str, ms: float, load_ms: float = 0.0, **more: float) -> dict[str, Any]:
    shape = {"requests": 1, "tokens": 4, "adapters": 1, "ranks": [8]}
    return {"kind": kind, **shape, "ms": ms, "load_ms": load_ms, **more}


def _step(kind: str = "prefill", overlap: float | None = None, cpu: float | None = None) -> LoggedStep:
    return LoggedStep(kind, 1.0, 0.0, overlap, cpu, None if cpu is None else 16.0)


def test_means_are_taken_over_steps_of_their_kind(tmp_path: Path) -> None:
    records = [_record("prefill", 10, 4), _record("mixed", 20, 0), _record("decode", 2), _record("decode", 4)]
    _write(tmp_path, "on_demand", records)
    [mode] = read_report(tmp_path).modes
    assert (mode.num_prefills, mode.num_decodes) == (2, 2)
    assert (mode.prefill_ms, mode.decode_ms, mode.load_ms) == (15.0, 3.0, 2.0)


def test_modes_come_in_their_own_order_and_others_last(tmp_path: Path) -> None:
    for mode in ("pipelined", "another", "cached", "on_demand"):
        _write(tmp_path, mode, [_record("prefill", 1)])
    assert [m.mode for m in read_report(tmp_path).modes] == ["cached", "on_demand", "pipelined", "another"]


def test_the_share_of_layers_on_the_cpu_is_over_all_layers_that_the_log_tells_of() -> None:
    steps = [_step(cpu=4.0, overlap=2.0), _step(cpu=12.0, overlap=4.0), _step("decode")]
    mode = summarize_steps("cpu_assisted", steps)
    assert mode.cpu_share == 0.5
    assert mode.overlapped_load_ms == 3.0


def test_a_missing_overlap_is_zero_where_nothing_can_overlap() -> None:
    assert summarize_steps("on_demand", [_step()]).overlapped_load_ms == 0.0


@pytest.mark.parametrize("mode", ["pipelined", "cpu_assisted", "auto"])
def test_a_missing_overlap_is_unknown_elsewhere(mode: str) -> None:
    assert summarize_steps(mode, [_step(), _step(overlap=3.0)]).overlapped_load_ms is None


def test_a_missing_cpu_count_is_zero_in_modes_without_the_cpu_only() -> None:
    assert summarize_steps("pipelined", [_step()]).cpu_share == 0.0
    assert summarize_steps("cpu_assisted", [_step()]).cpu_share is None


def test_a_log_without_prompts_has_no_prefill_time() -> None:
    mode = summarize_steps("cached", [_step("decode")])
    assert (mode.prefill_ms, mode.load_ms, mode.decode_ms) == (None, None, 1.0)


def test_the_emulated_link_is_read_from_the_runs_configuration(tmp_path: Path) -> None:
    _write(tmp_path, "cached", [_record("prefill", 1)], link_gbps=0.0)
    _write(tmp_path, "on_demand", [_record("prefill", 1)], link_gbps=2.5)
    assert read_report(tmp_path).link_gbps == [2.5]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{half a rec", "Expecting"),
        ("[1, 2]", "no JSON object"),
        ('{"kind": "prefill", "ms": 1}', "'load_ms' is missing"),
        ('{"kind": "nap", "ms": 1, "load_ms": 0}', "kind is 'nap'; it must be one of"),
        ('{"kind": "prefill", "ms": "1", "load_ms": 0}', "ms is '1'; it must be a number of at least 0"),
        ('{"kind": "prefill", "ms": 1, "load_ms": -1}', "load_ms is -1; it must be a number"),
        ('{"kind": "prefill", "ms": NaN, "load_ms": 0}', "ms is nan"),
        ("", "Expecting"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tmp_path: Path, line: str, reason: str) -> None:
    file = _write(tmp_path, "cached", [_record("prefill", 1)])
    with file.open("a") as log:
        log.write(line + "\n")
    with pytest.raises(ValueError, match=reason) as caught:
        read_report(tmp_path)
    assert f"{file}:2:" in str(caught.value)


def test_no_logs_at_all_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"<mode>/steps\.jsonl"):
        read_report(tmp_path)
