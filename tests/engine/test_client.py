"""The engine's process, as its clients see it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.engine.oracle import make_adapter, make_model, make_prompt, reference_tokens
from tests.waiting import PATIENCE_S, until
from toppings.bad_input import RequestError
from toppings.config import EngineConfig
from toppings.core import FinishReason
from toppings.engine.base import open_registry
from toppings.engine.client import EngineClient, EngineDeadError, EngineStartError
from toppings.messages import RequestOutput
from toppings.sampling_params import SamplingParams

pytestmark = pytest.mark.asyncio(loop_scope="module")  # of the engine that they share

GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=5000, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("client")
    model = make_model(root / "model", max_position_embeddings=8192)
    return model, make_adapter(root / "adapter", model, rank=8)


def make_config(model: Path, state_dir: Path) -> EngineConfig:
    return EngineConfig(
        model=str(model),
        state_dir=str(state_dir),
        dtype="float32",
        num_threads=1,
        kv_cache_bytes=16 * 2**20,
        device_pool_bytes=2**20,
        host_store_bytes=2**20,
        step_log=str(state_dir / "steps.jsonl"),
    )


@pytest.fixture
def config(checkpoints: tuple[Path, Path], tmp_path: Path) -> EngineConfig:
    """For an engine of the test's own."""
    return make_config(checkpoints[0], tmp_path)


@pytest.fixture(scope="module")
def shared_config(checkpoints: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return make_config(checkpoints[0], tmp_path_factory.mktemp("state"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(shared_config: EngineConfig) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(shared_config)
    yield client
    await client.shutdown(0.0)


async def collect(
    client: EngineClient, prompt: list[int], sampling: SamplingParams, **kwargs: Any
) -> list[int]:
    return [t async for output in client.generate(prompt, sampling, **kwargs) for t in output.token_ids]


async def run(
    client: EngineClient, sampling: SamplingParams, tokens: list[int], **kwargs: Any
) -> RequestOutput:
    """`tokens` grows with what comes."""
    async for output in client.generate(make_prompt(0, 10), sampling, **kwargs):
        tokens += output.token_ids
    return output


async def wait_until_idle(client: EngineClient) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (stats := await client.stats()).num_running or stats.num_waiting:
            await asyncio.sleep(0.01)
    assert stats.kv_pages_used == 0
    assert all(status.num_running == 0 for status in stats.adapters)


async def test_concurrent_requests_give_the_oracles_tokens(
    client: EngineClient, shared_config: EngineConfig, checkpoints: tuple[Path, Path]
) -> None:
    model, adapter = checkpoints
    adapter_id = (
        open_registry(shared_config).register("concurrent", adapter).adapter_id
    )  # after the engine has started
    prompts = [make_prompt(i, 10 + i) for i in range(6)]
    ids = [adapter_id if i % 2 else None for i in range(6)]
    results = await asyncio.gather(
        *(collect(client, prompt, GREEDY, adapter_id=a) for prompt, a in zip(prompts, ids))
    )
    expected = [reference_tokens(model, adapter if a else None, p, 10) for p, a in zip(prompts, ids)]
    assert results == expected


async def test_closing_the_stream_frees_pages_and_pin(
    client: EngineClient, shared_config: EngineConfig, checkpoints: tuple[Path, Path]
) -> None:
    adapter_id = open_registry(shared_config).register("closed", checkpoints[1]).adapter_id
    async with aclosing(client.generate(make_prompt(0, 10), ENDLESS, adapter_id)) as outputs:
        await anext(outputs)
        assert (await client.stats()).num_running == 1
    await wait_until_idle(client)
    assert client.num_open == 0


async def test_removing_an_adapter_waits_for_its_requests_and_frees_its_memory(
    client: EngineClient, shared_config: EngineConfig, checkpoints: tuple[Path, Path]
) -> None:
    registry = open_registry(shared_config)
    before = await client.stats()
    adapter_id = registry.register("removed", checkpoints[1]).adapter_id
    sampling = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    tokens: list[int] = []
    running = asyncio.create_task(run(client, sampling, tokens, adapter_id=adapter_id))
    await until(lambda: tokens)
    registry.remove("removed")
    await client.remove_adapter(adapter_id)
    await running
    assert len(tokens) == 200
    stats = await client.stats()
    assert (stats.host_bytes_used, stats.device_bytes_used) == (
        before.host_bytes_used,
        before.device_bytes_used,
    )
    assert adapter_id not in [status.adapter_id for status in stats.adapters]
    last = [output async for output in client.generate([3], GREEDY, adapter_id)][-1]
    assert last.finish_reason is FinishReason.ERROR
    assert "removed" in str(last.error)


async def test_an_unknown_adapter_and_a_prompt_too_long_each_get_one_clear_error(
    client: EngineClient,
) -> None:
    unknown = [output async for output in client.generate([3], GREEDY, 77)]
    too_long = [output async for output in client.generate([3] * 9000, GREEDY)]
    assert [o.finish_reason for o in unknown + too_long] == [FinishReason.ERROR] * 2
    assert "77" in str(unknown[0].error)
    assert "9000" in str(too_long[0].error)


async def test_pinning_loads_the_adapter_and_keeps_it(
    client: EngineClient, shared_config: EngineConfig, checkpoints: tuple[Path, Path]
) -> None:
    adapter_id = open_registry(shared_config).register("pinned", checkpoints[1]).adapter_id
    await client.pin_adapter(adapter_id, True)
    async with asyncio.timeout(PATIENCE_S):
        while not any(
            s.adapter_id == adapter_id and s.device_layers == s.num_layers
            for s in (await client.stats()).adapters
        ):
            await asyncio.sleep(0.01)
    pinned = [status.adapter_id for status in (await client.stats()).adapters if status.is_pinned]
    assert pinned == [adapter_id]
    with pytest.raises(RequestError, match="77"):
        await client.pin_adapter(77, True)


async def test_a_prefetched_adapter_is_in_host_memory_and_not_on_the_device(
    client: EngineClient, shared_config: EngineConfig, checkpoints: tuple[Path, Path]
) -> None:
    adapter_id = open_registry(shared_config).register("ahead", checkpoints[1]).adapter_id
    await client.prefetch_adapter(adapter_id)
    async with asyncio.timeout(PATIENCE_S):
        while not (
            found := [
                s for s in (await client.stats()).adapters if s.adapter_id == adapter_id and s.is_on_host
            ]
        ):
            await asyncio.sleep(0.01)
    assert found[0].device_layers == 0
    with pytest.raises(RequestError, match="77"):
        await client.prefetch_adapter(77)


async def test_shutdown_lets_requests_finish_within_the_deadline(config: EngineConfig) -> None:
    client = await EngineClient.start(config)
    tokens: list[int] = []
    running = asyncio.create_task(run(client, GREEDY, tokens))
    await until(lambda: tokens)
    await client.shutdown(PATIENCE_S)
    await running
    assert len(tokens) == 10


async def test_shutdown_cuts_what_is_left_after_the_deadline(config: EngineConfig) -> None:
    client = await EngineClient.start(config)
    tokens: list[int] = []
    running = asyncio.create_task(run(client, ENDLESS, tokens))
    await until(lambda: tokens)
    await client.shutdown(0.0)
    last = await running
    assert last.finish_reason is FinishReason.ABORT
    assert last.error == "the server is shutting down"


async def test_when_the_engine_is_killed_every_caller_hears_of_it(config: EngineConfig) -> None:
    client = await EngineClient.start(config)
    tokens: list[int] = []
    running = asyncio.create_task(run(client, ENDLESS, tokens))
    await until(lambda: tokens)
    pid = int(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()[-1])
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        await running
    assert not client.is_alive
    with pytest.raises(EngineDeadError):
        await client.stats()
    await client.shutdown(0.0)


async def test_an_engine_that_cannot_start_says_why(config: EngineConfig, tmp_path: Path) -> None:
    missing = EngineConfig(model=str(tmp_path / "nowhere"), state_dir=str(tmp_path))
    with pytest.raises(EngineStartError, match="nowhere"):
        await EngineClient.start(missing)


async def test_every_step_is_logged(client: EngineClient, shared_config: EngineConfig) -> None:
    num_before = len(Path(shared_config.step_log).read_text().splitlines())
    await collect(client, make_prompt(0, 10), GREEDY)
    lines: list[str] = []
    async with asyncio.timeout(PATIENCE_S):
        while len(lines) < 10:  # they are written beside the steps
            await asyncio.sleep(0.01)
            lines = Path(shared_config.step_log).read_text().splitlines()[num_before:]
    assert len(lines) == 10
    assert '"kind": "prefill"' in lines[0]
    assert '"kind": "decode"' in lines[-1]
