"""An engine that dies or hangs: everyone is told, it is ended, another takes its place."""

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.engine.oracle import make_adapter, make_model, make_prompt
from tests.waiting import PATIENCE_S
from toppings.bad_input import RequestError
from toppings.config import EngineConfig
from toppings.core import FinishReason
from toppings.engine import client as client_module
from toppings.engine.base import open_registry
from toppings.engine.client import EngineClient, EngineDeadError
from toppings.sampling_params import SamplingParams

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=5000, ignore_eos=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    root = tmp_path_factory.mktemp("restart")
    model = make_model(root / "model", max_position_embeddings=8192)
    config = EngineConfig(
        model=str(model),
        state_dir=str(root / "state"),
        dtype="float32",
        num_threads=1,
        kv_cache_bytes=16 * 2**20,
        device_pool_bytes=2**20,
        host_store_bytes=2**20,
        heartbeat_timeout_s=60.0,  # that it is stopped is seen sooner
    )
    registry = open_registry(config)
    registry.register("pinned", make_adapter(root / "pinned", model, rank=8))
    registry.set_pinned("pinned", True)
    registry.register("plain", make_adapter(root / "plain", model, rank=4))
    registry.close()
    return config


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(config: EngineConfig) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(config, max_restarts=50)
    yield client
    await client.shutdown(0.0)


@pytest_asyncio.fixture(loop_scope="module")
async def client(shared: EngineClient) -> EngineClient:
    await until_up(shared)
    return shared


def pid_of(client: EngineClient) -> int:
    assert client._life is not None
    pid = client._life._process.pulse.pid
    assert pid is not None
    return pid


async def until_up(client: EngineClient) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not client.is_alive:
            await asyncio.sleep(0.02)


async def collect(client: EngineClient, sampling: SamplingParams = GREEDY, **kwargs: Any) -> list[int]:
    outputs = client.generate(make_prompt(0, 10), sampling, **kwargs)
    return [t async for output in outputs for t in output.token_ids]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_an_engine_that_goes_is_replaced_and_everyone_is_told(
    client: EngineClient, number: signal.Signals
) -> None:
    before, old, num_restarts = await collect(client), pid_of(client), client.num_restarts
    running = [asyncio.create_task(collect(client, ENDLESS)) for _ in range(3)]
    while (await client.stats()).num_running < 3:
        await asyncio.sleep(0.01)
    os.kill(old, number)
    async with asyncio.timeout(PATIENCE_S):
        results = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(result, EngineDeadError) and str(old) in str(result) for result in results)
    assert not client.is_alive
    assert "the engine is restarting" in client.down_reason
    with pytest.raises(EngineDeadError, match="restarting"):
        await collect(client)
    await until_up(client)
    assert await collect(client) == before
    assert (client.num_pending, client.num_open) == (0, 0)
    assert pid_of(client) != old
    with pytest.raises(ProcessLookupError):
        os.kill(old, 0)
    assert (await client.stats()).counters["engine_restarts"] == num_restarts + 1


async def test_adapters_and_pins_outlive_an_engine(client: EngineClient, config: EngineConfig) -> None:
    registry = open_registry(config)
    pinned, plain = (registry.get(name).adapter_id for name in ("pinned", "plain"))
    before = await collect(client, adapter_id=plain)
    os.kill(pid_of(client), signal.SIGKILL)
    while client.is_alive:
        await asyncio.sleep(0.01)
    await until_up(client)
    async with asyncio.timeout(PATIENCE_S):
        while not any(
            s.adapter_id == pinned and s.is_pinned and s.device_layers == s.num_layers
            for s in (await client.stats()).adapters
        ):
            await asyncio.sleep(0.01)
    assert await collect(client, adapter_id=plain) == before


async def test_an_adapter_that_is_removed_while_the_engine_dies_is_removed(client: EngineClient) -> None:
    os.kill(pid_of(client), signal.SIGSTOP)
    removal = asyncio.create_task(client.remove_adapter(4711))
    await asyncio.sleep(0.05)
    os.kill(pid_of(client), signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_S):
        await removal


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_the_process_that_forks_engines_may_go_too(
    client: EngineClient, number: signal.Signals
) -> None:
    forker = client._spawner._process
    assert forker is not None
    forker.send_signal(number)
    assert await collect(client)
    os.kill(pid_of(client), signal.SIGKILL)
    while client.is_alive:
        await asyncio.sleep(0.01)
    await until_up(client)
    assert await collect(client)


async def test_what_no_message_can_carry_is_named_and_takes_no_place(client: EngineClient) -> None:
    too_large = SamplingParams(max_tokens=4, top_k=0)
    object.__setattr__(too_large, "top_k", 2**64)
    with pytest.raises(RequestError, match="top_k"):
        await collect(client, too_large)
    lone = SamplingParams(max_tokens=4)
    object.__setattr__(lone, "stop", ("\ud800",))
    with pytest.raises(RequestError, match="stop"):
        await collect(client, lone)
    with pytest.raises(RequestError, match="adapter_id"):
        await client.pin_adapter(2**64, True)
    assert (client.num_pending, client.num_open, len(client._calls)) == (0, 0, 0)
    assert len(await collect(client)) == 6


@pytest.mark.parametrize("prompt", [["x"], [1.5], [-1], [10**6], [2**63]])
async def test_tokens_that_are_none_are_refused_and_the_engine_goes_on(
    client: EngineClient, prompt: list[Any]
) -> None:
    old = pid_of(client)
    (output,) = [output async for output in client.generate(prompt, GREEDY)]
    assert output.finish_reason is FinishReason.ERROR
    assert output.error
    assert len(await collect(client)) == 6
    assert pid_of(client) == old


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
async def test_closing_is_bounded_whatever_state_the_engine_is_in(config: EngineConfig, number: int) -> None:
    client = await EngineClient.start(config)
    running = asyncio.create_task(collect(client, ENDLESS))
    while not (await client.stats()).num_running:
        await asyncio.sleep(0.01)
    pid = pid_of(client)
    os.kill(pid, number)
    async with asyncio.timeout(PATIENCE_S):
        await client.shutdown(0.0)
        await asyncio.wait([running])
    assert client.died.is_set()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_an_engine_that_keeps_dying_is_not_replaced_for_ever(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_RESTART_DELAY_S", 0.1)
    client = await EngineClient.start(config, max_restarts=2)
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(3):
            await client._until_changed()
            os.kill(pid_of(client), signal.SIGKILL)
            while client.is_alive:
                await asyncio.sleep(0.01)
        await client.died.wait()
    assert client.num_restarts == 2
    assert "has died" in client.down_reason
    await client.shutdown(0.0)


HANGS = """
import time
from toppings.engine import process
from toppings.engine.engine import Engine
step = Engine.step
def stuck(self):
    while self.has_requests: time.sleep(1)
    return step(self)
Engine.step = stuck
process.main()
"""


async def test_a_step_that_never_ends_ends_the_engine(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process lives and gives signs of life, but its loop does not turn any more."""
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **more: popen([command[0], "-c", HANGS, *command[3:]], **more)
    )
    client = await EngineClient.start(EngineConfig(**{**vars_of(config), "step_timeout_s": 1.0}))
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(EngineDeadError, match="hangs in a step"):
            await collect(client, ENDLESS)  # the step is replaced while it goes on
        await client.shutdown(0.0)


def vars_of(config: EngineConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}
