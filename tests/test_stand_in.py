"""The routing benchmark's stand-in servers: steps by hand, their API as the router reads it, its loads."""

import asyncio
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from routing import Plan
from stand_in.app import HttpServer
from stand_in.load import Lengths, Load, adapter_bytes, poisson_load, trace_load
from stand_in.results import Observed, compare, make_row, results_table
from stand_in.server import Job, Server
from stand_in.virtual import observe

from tests.sim.builders import make_trace
from toppings.cluster.instances import Instances
from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.policies import Policy, PolicySettings, make_policy
from toppings.cluster.report import read_report
from toppings.cluster.snapshot import Choice, RequestSnapshot
from toppings.lab.outcome import Outcome
from toppings.sim.readers import load_trace
from toppings.sim.trace import Trace, write_trace

MODEL = load_perf_model("published:bgmv")
RANKS = {"small": 8, "large": 64}


def job(number: int, adapter: str, *, num_tokens: int, prompt_tokens: int = 100) -> Job:
    rank = RANKS[adapter]
    request = RequestSnapshot(str(number), adapter, rank, prompt_tokens, 10.0, adapter_bytes(rank))
    return Job(request, num_tokens, 0.0)


def test_steps_take_what_the_model_says() -> None:
    server = Server("s", MODEL)
    first, second = job(0, "small", num_tokens=2), job(1, "large", num_tokens=3)
    server.waiting += [first, second]
    load_ms = sum(adapter_bytes(rank) for rank in (8, 64)) / 24e6
    assert server.start_step() == pytest.approx(28.7 + 0.06 * 200 + load_ms)
    assert server.end_step() == ([first, second], [])
    assert server.start_step() == pytest.approx(31.8 + 0.0039 * 2 * 64)
    assert server.end_step() == ([first, second], [first])
    assert server.start_step() == pytest.approx(31.8 + 0.0039 * 1 * 64)
    assert server.end_step() == ([second], [second])
    assert server.start_step() is None
    assert server.rank_counts == {8: 1, 64: 1}
    assert server.kv_tokens_used == 0


def test_an_adapter_that_is_there_costs_no_load() -> None:
    server = Server("s", MODEL)
    for number in range(2):
        server.waiting.append(job(number, "large", num_tokens=1))
        step_ms = server.start_step()
        server.end_step()
    assert step_ms == pytest.approx(28.7 + 0.06 * 100)


def test_an_adapter_that_finds_no_room_waits_and_is_overtaken() -> None:
    server = Server("s", MODEL, device_adapters=1)
    small, large, later = (job(i, name, num_tokens=1) for i, name in enumerate(("small", "large", "small")))
    server.waiting += [small, large, later]
    server.start_step()
    assert server.end_step() == ([small, later], [small, later])
    server.start_step()
    assert server.end_step() == ([large], [large])
    assert list(server.held) == ["large"]


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_an_aborted_job_leaves_nothing_behind(num_steps: int) -> None:
    """Waiting, prefilled and decoding ones alike."""
    server = Server("s", MODEL)
    gone, stays = job(0, "large", num_tokens=9), job(1, "small", num_tokens=4)
    server.waiting += [gone, stays]
    for _ in range(num_steps):
        server.start_step()
        server.end_step()
    server.start_step()
    server.abort(gone)
    ended: list[Job] = []
    while not ended:
        _, ended = server.end_step()
        server.start_step()
    assert ended == [stays]
    assert server.kv_tokens_used == 0
    assert server.rank_counts == {8: 1}


async def test_the_router_reads_a_stand_in_as_a_toppings_server() -> None:
    stand_in = HttpServer(Server("s", MODEL), RANKS)
    stand_in.server.waiting += [job(0, "large", num_tokens=5), job(1, "small", num_tokens=5)]
    stand_in.server.start_step()
    stand_in.server.end_step()
    stand_in.server.waiting.append(job(2, "large", num_tokens=5))
    async with TestClient(TestServer(stand_in.app())) as client:
        report = read_report(await (await client.get("/stats")).read())
        cards = (await (await client.get("/v1/models")).json())["data"]
    assert report.ranks == Counter({8: 1, 64: 2})
    assert report.on_device == report.on_host == {"small", "large"}
    assert report.max_num_seqs == 64
    assert report.kv_tokens_used == 202
    assert report.read_perf_model() == MODEL
    assert {card["id"]: card["parent"] for card in cards} == {"base": None, "small": "base", "large": "base"}


async def test_a_stand_in_streams_as_many_tokens_as_were_asked_for() -> None:
    stand_in = HttpServer(Server("s", MODEL), RANKS)
    body = {"model": "small", "prompt": [7] * 20, "max_tokens": 3, "stream": True, "ignore_eos": True}
    steps = asyncio.create_task(stand_in.step_for_ever())
    async with TestClient(TestServer(stand_in.app())) as client:
        text = await (await client.post("/v1/completions", json=body)).text()
        unknown = await client.post("/v1/completions", json={**body, "model": "none"})
        whole = await client.post("/v1/completions", json={**body, "stream": False})
    steps.cancel()
    assert text.count('"text"') == 3
    assert text.count('"finish_reason": "length"') == 1
    assert '"completion_tokens": 3' in text
    assert text.endswith("data: [DONE]\n\n")
    assert (unknown.status, whole.status) == (404, 400)
    assert (stand_in.num_answered, stand_in.num_aborted) == (1, 0)


def test_every_request_is_served_by_one_server() -> None:
    load = poisson_load(30.0, 4.0, 0, Lengths(20, 60))
    observed = observe(load, make_policy("dlora"), [Server(f"s{i}", MODEL) for i in range(3)])
    assert sum(counts.total() for counts in observed.rank_counts) == len(load.trace)
    assert min(outcome.tpt_ms for outcome in observed.outcomes if outcome.tpt_ms is not None) > 28.7


class Watching(Policy):
    """Notes what the only server's accounts say whenever it is asked: waiting, all, adapters held."""

    rule = "watched"

    def __init__(self) -> None:
        super().__init__(PolicySettings())
        self.seen: list[tuple[int, int, set[str]]] = []

    def choose(self, request: RequestSnapshot, instances: Instances) -> Choice:
        counts = len(instances.queued[0]), int(instances.num_requests[0])
        self.seen.append((*counts, set(instances.on_device[0])))
        return Choice(0, instances.ids[0])


def test_on_the_virtual_clock_a_request_waits_until_its_first_token() -> None:
    """Arrivals before, during and after the first one's prefill of some 40 ms, while it decodes."""
    arrivals = (0.0, 0.001, 0.02, 0.1)
    trace = replace(
        make_trace(arrivals, adapters=(1, 0, 0, 0), prompt=100, response=9, ranks=tuple(RANKS.values())),
        names=tuple(RANKS),
    )
    policy = Watching()
    observed = observe(Load(trace, 10.0), policy, [Server("s0", MODEL)])
    held = {"small", "large"}
    assert policy.seen == [(0, 0, set()), (1, 1, {"large"}), (2, 2, held), (0, 3, held)]
    assert observed.rank_counts == [{8: 3, 64: 1}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rates": "bgmv:30"}, "there is none for mbgmv"),
        ({"rates": "0"}, "a rate is 0"),
        ({"pools": "64"}, "a pool is '64'; it must be like 64@24"),
        ({"pools": "0@24"}, "a pool is '0@24'; it must hold an adapter or more"),
        ({"policies": "best"}, "unknown policy 'best'"),
        ({"kernels": "dense"}, "decode form 'dense' is not in the model"),
        ({"seeds": 0}, "seeds is 0"),
    ],
)
def test_a_plan_that_cannot_be_run_is_named(settings: dict[str, object], message: str) -> None:
    Plan(rates="bgmv:30;mbgmv:40,50").check(None)
    with pytest.raises(ValueError, match=message):
        Plan(**settings).check(None)  # type: ignore[arg-type]


def test_a_trace_keeps_its_adapters_and_lengths_at_the_rate_asked_for(tmp_path: Path) -> None:
    count = 40
    trace = Trace(
        np.arange(1, count + 1, dtype=np.float64),
        np.arange(count, dtype=np.int32) % 2,
        np.full(count, 30, dtype=np.int32),
        np.arange(1, count + 1, dtype=np.int32),
        np.array([8, 64], dtype=np.int32),
        duration_s=float(count),
        origin="made.csv",
        names=("small", "large"),
    )
    write_trace(trace, tmp_path / "made.csv")
    read = load_trace(tmp_path / "made.csv", format_name="toppings")
    load = trace_load(read, 4.0, 5.0, 1)  # the second five seconds at four times the speed
    jobs = load.jobs()
    assert [job.arrived_at for job in jobs] == pytest.approx([250.0 * i for i in range(20)])
    assert [job.num_tokens for job in jobs] == list(range(20, 40))
    assert {(job.snapshot.adapter, job.snapshot.rank) for job in jobs} == {("small", 8), ("large", 64)}
    with pytest.raises(ValueError, match=r"lasts 10\.0 s at 4 requests/s; 3 seeds of 5 s need 15 s"):
        trace_load(read, 4.0, 5.0, 2)


def test_a_refused_request_does_not_attain_and_gains_are_by_seed() -> None:
    def outcome(tpt_ms: float | None) -> Outcome:
        if tpt_ms is None:
            return Outcome("a", 0.5, 0.0, error="refused")
        return Outcome("a", 0.5, tpt_ms, tpt_ms, num_tokens=1)

    def row(policy: str, *tpts: list[float | None]) -> dict[str, object]:
        counts = [Counter({8: 1}), Counter({64: 1})]
        trials = [Observed([outcome(each) for each in tpt], counts) for tpt in tpts]
        setting = {"clock": "virtual", "arrivals": "Poisson", "kernel": "bgmv", "pool": "64@24", "rate": 1.0}
        return make_row({**setting, "policy": policy}, trials, 1.0, 40.0)

    rows = [row("rank_aware", [30.0, 30.0], [30.0, 50.0]), row("random", [30.0, None], [50.0, 50.0])]
    compare(rows)
    assert rows[0]["attainment_by_seed"] == [1.0, 0.5]
    assert rows[1]["attainment_by_seed"] == [0.5, 0.0]
    assert (rows[1]["gain"], rows[1]["gain_stdev"]) == (-0.5, 0.0)
    assert rows[1]["mean_rank_stdev"] == 28.0
    assert results_table(rows, "title").row_count == 3
