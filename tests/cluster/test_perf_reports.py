"""A server that tells its step costs and its limits is placed on by them."""

import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.cluster.conftest import Start
from tests.cluster.fakes import FakeToppings, serving
from toppings.cluster.perf_model import LinearModel, PerfModel, load_perf_model
from toppings.cluster.router.app import running_router
from toppings.cluster.router.settings import InstanceConfig, RouterConfig

SLOW, FAST = (
    PerfModel(
        "made up",
        {"mbgmv": LinearModel({"steps": ms, "rank_sum": 0.01})},
        {"tokens": LinearModel({"steps": ms, "tokens": 0.1})},
        "mbgmv",
        "tokens",
        link_gbps=10.0,
    )
    for ms in (90.0, 9.0)
)


def server_with(model: PerfModel | None, max_num_seqs: int = 64) -> FakeToppings:
    return FakeToppings(extra_stats={"perf_model": msgspec.to_builtins(model), "max_num_seqs": max_num_seqs})


async def test_what_a_server_tells_of_itself_is_what_it_is_judged_by(start_router: Start) -> None:
    with serving(server_with(FAST, 3)) as first, serving(server_with(None, 5)) as second:
        async with start_router(first, second) as client:
            told, silent = (client.router.state.fleet.instance(name) for name in ("s0", "s1"))
    assert (told.perf_model, told.max_num_seqs) == (FAST, 3)
    assert (silent.perf_model, silent.max_num_seqs) == (load_perf_model(RouterConfig().perf_model), 5)


async def test_costs_that_nobody_has_measured_are_told_of(
    start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(server_with(FAST)) as first, serving(server_with(None)) as second:
        async with start_router(first, second):
            told = [record.message for record in caplog.records if "no measured step times" in record.message]
    assert len(told) == 1
    assert told[0].startswith("s1 ")


class Locked(FakeToppings):
    """It asks the router for a key, as it asks everybody."""

    async def stats(self, request: Request) -> Response:
        return JSONResponse({"error": "Unauthorized"}, 401)


async def test_a_server_that_wants_a_key_of_the_router_is_told_of(
    start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(Locked()) as url:
        async with start_router(url) as client, client.complete() as response:
            assert response.status == 200  # with a key of the client's
    assert "s0 answers the router with 401" in caplog.text
    assert "upstream_api_key" in caplog.text


@pytest.mark.parametrize("fast", [0, 1])
async def test_a_request_goes_where_the_told_costs_keep_the_objective(start_router: Start, fast: int) -> None:
    servers = [server_with(FAST if i == fast else SLOW) for i in range(2)]
    with serving(servers[0]) as first, serving(servers[1]) as second:
        async with start_router(first, second, policy="rank_aware", slo_tpt_ms=50.0) as client:
            for _ in range(4):
                async with client.complete() as response:
                    assert response.status == 200
    assert [len(server.seen) for server in servers] == [4 * (i == fast) for i in range(2)]


async def test_the_routers_own_setting_for_an_instance_comes_first() -> None:
    with serving(server_with(FAST)) as url:
        instance = InstanceConfig(url=url, instance_id="s0", perf_model="published:mbgmv")
        async with running_router(RouterConfig(instances=(instance,), port=0)) as (router, _):
            assert router.state.fleet.instance("s0").perf_model == load_perf_model("published:mbgmv")
