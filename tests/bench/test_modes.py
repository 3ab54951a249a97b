import asyncio
import json
import socket
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.bench import fake_server
from toppings.config import Config
from toppings.lab.http.server import ServerStartError, free_port, running_server
from toppings.lab.modes import compare as modes
from toppings.lab.modes.compare import compare_modes
from toppings.lab.modes.comparison import ModeResult, ModesComparison, ModesSpec, Survey
from toppings.lab.modes.report import read_report
from toppings.lab.outcome import Outcome
from toppings.lab.summary import summarize
from toppings.lab.workload import LoadShape

NUM_ADAPTERS = 8
MODES = ("cached", "on_demand", "pipelined")


def _command(config_file: Path) -> list[str]:
    return [sys.executable, fake_server.__file__, str(config_file)]


def _spec(directory: Path, **more: Any) -> ModesSpec:
    for i in range(NUM_ADAPTERS):
        (directory / "adapters" / f"adapter-{i}").mkdir(parents=True, exist_ok=True)
    settings = {
        "adapters": str(directory / "adapters"),
        "log_dir": str(directory / "logs"),
        "api_key": "secret",
    }
    load = LoadShape(num_requests=10, prompt_tokens=6, max_tokens=4)
    given = {"num_adapters": NUM_ADAPTERS, "load_ratio": 1.5, "modes": MODES, "load": load, **more}
    return ModesSpec(base=Config.from_settings(settings), **given)


def _compare(directory: Path, spec: ModesSpec, calls: list[tuple[str, int]] | None = None) -> ModesComparison:
    progress = [] if calls is None else calls
    (directory / "work").mkdir()
    work = compare_modes(spec, directory / "work", lambda what, n: progress.append((what, n)), _command)
    return asyncio.run(work)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModesComparison, Path, list[tuple[str, int]]]:
    directory = tmp_path_factory.mktemp("modes")
    calls: list[tuple[str, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modes, "available_memory_bytes", lambda: 2**40)
        return _compare(directory, _spec(directory), calls), directory, calls


Ran = tuple[ModesComparison, Path, list[tuple[str, int]]]


def test_every_mode_gets_both_loads_without_errors(ran: Ran) -> None:
    comparison, _, _ = ran
    assert [result.mode for result in comparison.results] == list(MODES)
    for result in comparison.results:
        assert {kind: (s.num_requests, s.num_errors) for kind, s in result.loads.items()} == {
            "sequential": (10, 0),
            "poisson": (10, 0),
        }


def test_all_modes_are_sent_the_same_requests(ran: Ran) -> None:
    comparison, _, _ = ran
    adapters = [[o.adapter for o in result.outcomes["poisson"]] for result in comparison.results]
    assert adapters[0] == adapters[1] == adapters[2]


def _spans(outcomes: list[Outcome]) -> list[tuple[float, float]]:
    return [(outcome.sent_at, outcome.sent_at + outcome.e2e_ms / 1e3) for outcome in outcomes]


def test_each_request_goes_to_all_modes_before_the_next_one_does(ran: Ran) -> None:
    comparison, _, _ = ran
    assert comparison.is_interleaved
    by_request = zip(*(_spans(result.outcomes["sequential"]) for result in comparison.results), strict=True)
    ends = 0.0
    for spans in by_request:
        assert min(start for start, _ in spans) > ends
        ends = max(end for _, end in spans)


def test_only_one_server_has_requests_at_a_time(ran: Ran) -> None:
    comparison, _, _ = ran
    spans = sorted(
        span
        for result in comparison.results
        for span in (_whole(result.outcomes["poisson"]), *_one_by_one(result))
    )
    assert all(end < start for (_, end), (start, _) in pairwise(spans))


def _one_by_one(result: ModeResult) -> list[tuple[float, float]]:
    return _spans(result.outcomes["sequential"])


def _whole(outcomes: list[Outcome]) -> tuple[float, float]:
    starts, ends = zip(*_spans(outcomes), strict=True)
    return min(starts), max(ends)


def test_the_order_of_the_modes_changes(ran: Ran) -> None:
    comparison, _, _ = ran
    sent = zip(*([o.sent_at for o in r.outcomes["sequential"]] for r in comparison.results), strict=True)
    orders = {tuple(sorted(range(len(times)), key=times.__getitem__)) for times in sent}
    assert len(orders) > 1


def test_the_total_time_leaves_other_modes_turns_out(ran: Ran) -> None:
    comparison, _, _ = ran
    for result in comparison.results:
        waited_s = sum(outcome.e2e_ms for outcome in result.outcomes["sequential"]) / 1e3
        assert result.loads["sequential"].total_s == pytest.approx(waited_s)


@pytest.mark.parametrize(("more", "memory"), [({"one_at_a_time": True}, 2**40), ({}, 0)])
def test_asked_to_or_short_of_memory_one_server_follows_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], memory: int
) -> None:
    monkeypatch.setattr(modes, "available_memory_bytes", lambda: memory)
    load = LoadShape(num_requests=3, prompt_tokens=6, max_tokens=4)
    comparison = _compare(tmp_path, _spec(tmp_path, modes=("cached", "pipelined"), load=load, **more))
    assert not comparison.is_interleaved
    cached, pipelined = (
        [_whole(result.outcomes[kind]) for kind in ("sequential", "poisson")] for result in comparison.results
    )
    assert cached[-1][1] < pipelined[0][0]


def _result(mode: str, ttfts_ms: list[float]) -> ModeResult:
    outcomes = [Outcome("a", 0.0, 2 * ms, ms, num_tokens=4) for ms in ttfts_ms]
    return ModeResult(mode, {}, {"sequential": summarize(outcomes)}, {"sequential": outcomes})


def test_paired_ratios_are_medians_over_the_requests() -> None:
    results = [
        _result("cached", [10.0, 20.0, 40.0]),
        _result("on_demand", [30.0, 60.0, 120.0]),
        _result("pipelined", [12.0, 24.0, 60.0]),
        _result("auto", [11.0, 30.0, 48.0]),
    ]
    spec = ModesSpec(base=Config(), modes=("cached",), load=LoadShape())
    comparison = ModesComparison(spec, Survey({}, 0, 1.0, 1.0), 0.0, 1.0, results)
    best = comparison.best_fixed("sequential", "ttft")
    assert best is not None
    assert best.mode == "pipelined"
    paired = [comparison.paired_ratios(result, "sequential")["ttft"] for result in results]
    assert [ratio["cached"] for ratio in paired] == pytest.approx([1.0, 3.0, 1.2, 1.2])
    assert paired[3]["best_fixed"] == pytest.approx(11 / 12)


def test_requests_that_fail_in_one_mode_are_in_no_pair() -> None:
    cached, pipelined = _result("cached", [10.0, 10.0]), _result("pipelined", [20.0, 50.0])
    pipelined.outcomes["sequential"][1] = Outcome("a", 0.0, 50.0, 50.0, error="gone")
    spec = ModesSpec(base=Config(), modes=("cached",), load=LoadShape())
    comparison = ModesComparison(spec, Survey({}, 0, 1.0, 1.0), 0.0, 1.0, [cached, pipelined])
    assert comparison.paired_ratios(pipelined, "sequential")["ttft"]["cached"] == 2.0


def test_ttft_holds_what_a_mode_waits_for(ran: Ran) -> None:
    _, on_demand, _ = ran[0].results
    waits_ms = 1e3 * (fake_server.PREFILL_S + fake_server.LOAD_S["on_demand"])
    for outcome in (*on_demand.outcomes["sequential"], *on_demand.outcomes["poisson"]):
        assert outcome.ttft_ms is not None
        assert outcome.ttft_ms >= waits_ms


def test_ratios_are_over_cached(ran: Ran) -> None:
    comparison, _, _ = ran
    cached, on_demand, _ = comparison.results
    assert set(comparison.ratios(cached, "poisson")["ttft"].values()) == {1.0}
    mine, reference = on_demand.loads["poisson"].ttft, cached.loads["poisson"].ttft
    assert mine is not None
    assert reference is not None
    assert comparison.ratios(on_demand, "poisson")["ttft"]["p50"] == mine.p50 / reference.p50


def test_cold_requests_are_counted_by_the_server(ran: Ran) -> None:
    comparison, _, _ = ran
    cold = {result.mode: result.loads["poisson"].num_cold for result in comparison.results}
    assert cold == {"cached": 0, "on_demand": 10, "pipelined": 10}


def test_servers_differ_in_mode_and_pool_only(ran: Ran) -> None:
    comparison, _, _ = ran
    cached, on_demand, _ = (result.settings for result in comparison.results)
    differing = {name for name in cached if cached[name] != on_demand[name]}
    assert differing == {"mode", "device_pool_bytes", "port", "state_dir"}
    assert cached["device_pool_bytes"] == NUM_ADAPTERS * fake_server.ADAPTER_BYTES
    assert on_demand["device_pool_bytes"] == NUM_ADAPTERS * fake_server.ADAPTER_BYTES // 4


def test_the_link_makes_a_load_take_the_asked_multiple_of_a_prefill(ran: Ran) -> None:
    comparison, _, _ = ran
    load_ms = fake_server.ADAPTER_BYTES / comparison.link_gbps / 1e6
    assert load_ms == pytest.approx(1.5 * comparison.survey.prefill_ms, rel=0.01)


def test_the_step_logs_hold_the_measured_requests_alone(ran: Ran) -> None:
    _, directory, _ = ran
    assert [mode.num_prefills for mode in read_report(directory / "logs").modes] == [20, 20, 20]


def test_the_key_is_written_to_no_result_and_left_in_no_file(ran: Ran) -> None:
    comparison, directory, _ = ran
    assert "secret" not in json.dumps(comparison.to_json())
    logs = [path for path in (directory / "logs").rglob("*") if path.is_file()]
    assert logs
    assert not any(b"secret" in path.read_bytes() for path in logs)


def test_progress_adds_up_to_all_requests(ran: Ran) -> None:
    comparison, _, calls = ran
    assert sum(n for _, n in calls) == len(MODES) * comparison.spec.num_requests_per_mode()


def test_the_json_says_how_it_was_measured(ran: Ran) -> None:
    content = json.loads(json.dumps(ran[0].to_json()))
    assert content["emulated_link_gbps"] == ran[0].link_gbps
    assert content["spec"]["load"]["num_requests"] == 10
    assert content["modes"]["on_demand"]["config"]["mode"] == "on_demand"
    assert set(content["modes"]["on_demand"]["ratios"]["sequential"]) == {"ttft", "tpt", "e2e"}
    best = ran[0].best_fixed("sequential", "ttft")
    assert best is not None
    assert content["best_fixed"]["sequential"]["ttft"] == best.mode
    assert content["modes"]["on_demand"]["paired_ratios"]["sequential"]["ttft"]["cached"] > 1
    assert content["is_interleaved"]
    assert len(content["modes"]["cached"]["poisson"]["requests"]) == 10


def test_from_the_disk_the_host_store_holds_few_adapters_and_nothing_is_preloaded(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []
    comparison = _compare(tmp_path, _spec(tmp_path, home="disk", modes=("on_demand",), load_ratio=0.0), calls)
    [result] = comparison.results
    assert result.settings["host_store_bytes"] == NUM_ADAPTERS * fake_server.ADAPTER_BYTES // 4
    assert not any("preload" in what for what, _ in calls)
    assert comparison.ratios(result, "poisson") == {}


def test_a_server_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    settings = {"served_model_name": "broken", "log_dir": str(tmp_path), "port": free_port()}

    async def start() -> None:
        async with running_server(Config.from_settings(settings), _command):
            pass

    with pytest.raises(ServerStartError, match=r"(?s)ended with exit code 1.*the model is broken"):
        asyncio.run(start())


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"modes": ("cached", "warm")}, "modes are cached,warm; choose from"),
        ({"modes": ("cached", "cached")}, "each once"),
        ({"num_adapters": 3}, "num_adapters is 3; for cold requests it must be at least 4"),
        ({"num_warmup": -1}, "num_warmup is -1"),
        ({"home": "cloud"}, "home is 'cloud'; choose one of host, disk"),
        ({"load_ratio": -1.0}, "load_ratio is -1.0"),
    ],
)
def test_a_comparison_out_of_range_is_refused(tmp_path: Path, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        _spec(tmp_path, **given)


def test_two_ways_to_set_the_link_are_refused() -> None:
    base = Config.from_settings({"link_gbps": 1.0})
    with pytest.raises(ValueError, match="both set the link"):
        ModesSpec(base=base, modes=MODES, load=LoadShape(), load_ratio=1.5)


def test_more_adapters_than_the_configured_directory_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_adapters is 9, but .* has 8 usable ones"):
        _compare(tmp_path, _spec(tmp_path, num_adapters=9))


def test_no_server_is_left_behind_when_the_work_with_it_fails(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    settings = {"adapters": str(tmp_path / "adapters"), "log_dir": str(tmp_path), "port": free_port()}

    async def fail() -> None:
        async with running_server(Config.from_settings(settings), _command) as client:
            await client.get("/ready")
            raise KeyError("the work")

    with pytest.raises(KeyError, match="the work"):
        asyncio.run(fail())
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", settings["port"])) != 0
