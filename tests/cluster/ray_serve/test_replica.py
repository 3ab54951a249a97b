"""A replica without Serve and without an engine."""

from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from toppings.cluster.ray_serve.messages import Call
from toppings.cluster.ray_serve.replica import EngineReplica
from toppings.core import FinishReason, Standing
from toppings.messages import RequestOutput
from toppings.sampling_params import SamplingParams
from toppings.server.exchange import current_exchange


async def test_its_engine_is_told_who_asks_and_its_log_names_the_clients_request() -> None:
    seen: list[tuple[Standing, str]] = []

    async def generate(*args: Any, standing: Standing, **options: Any) -> AsyncGenerator[RequestOutput, None]:
        exchange = current_exchange.get()
        seen.append((standing, "" if exchange is None else exchange.request_id))
        yield RequestOutput("front-0", [7], finish_reason=FinishReason.STOP)

    client = SimpleNamespace(generate=generate)
    replica: Any = SimpleNamespace(_id="r", _requests={}, _client=client, _period_s=lambda: 0.0)
    standing = Standing(tenant="team", weight=2.0)
    call = Call("front-0", [1, 2], SamplingParams(), None, 8.0, standing=standing, http_id="mine")
    outputs = [output async for output in EngineReplica.generate(replica, call)]
    assert outputs[0] == "r"
    assert [output.token_ids for output in outputs if isinstance(output, RequestOutput)] == [[7]]
    assert seen == [(standing, "mine")]
