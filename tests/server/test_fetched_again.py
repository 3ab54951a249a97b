"""Adapters of sources whose packed file is damaged: fetched again for the request that found it out."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes import FakeEngineClient
from tests.server.conftest import Server, events
from tests.sources.hub_server import Hub
from toppings.adapters.errors import AdapterError
from toppings.adapters.registry import AdapterRecord, AdapterRegistry
from toppings.core import FinishReason
from toppings.messages import RequestOutput
from toppings.sampling_params import SamplingParams

LOAD = "/v1/load_lora_adapter"
WEIGHTS = "adapter_model.safetensors"


@dataclass
class ReadingEngine(FakeEngineClient):
    """Reads the packed file of whose adapter a request is for, as engines do, and fails as they do."""

    registry: AdapterRegistry | None = None

    async def generate(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        adapter_id: int | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        tenant: str = "",
        weight: float = 1.0,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        try:
            if self.registry is not None and adapter_id is not None:
                with self.registry.open_packed(adapter_id) as packed:
                    packed.check()
        except AdapterError as error:
            yield RequestOutput("x", [], finish_reason=FinishReason.ERROR, error=str(error))
            return
        async for output in super().generate(prompt_token_ids, sampling, adapter_id):
            yield output


@pytest.fixture
async def engine(registry: AdapterRegistry) -> FakeEngineClient:
    return ReadingEngine(registry=registry)


@pytest.fixture
def settings(hub: Hub) -> dict[str, object]:
    return {"adapter_source": ["hub:org/*"]}


def damage(server: Server, record: AdapterRecord, where: str) -> None:
    file = server.registry.state_dir / "packed" / f"{record.adapter_id}.pack"
    content = bytearray(file.read_bytes())
    if where == "gone":
        file.unlink()
        return
    content[16 if where == "header" else -8] ^= 0x10
    file.write_bytes(content)


async def fetched(server: Server, name: str) -> AdapterRecord:
    assert (await server.complete(model=name)).status_code == 200
    return server.registry.get(name)


@pytest.mark.parametrize("where", ["gone", "header", "weights"])
async def test_it_is_fetched_again_and_the_request_is_served(server: Server, hub: Hub, where: str) -> None:
    old = await fetched(server, "org/one")
    damage(server, old, where)
    reply = await server.complete(model="org/one", n=2, temperature=1.0)
    assert (reply.status_code, len(reply.json()["choices"])) == (200, 2), reply.text
    new = server.registry.get("org/one")
    assert new.adapter_id != old.adapter_id
    assert (new.digest, new.path) == (old.digest, old.path)
    assert hub.num_fetched[f"org/one/{WEIGHTS}"] == 2
    while old.adapter_id not in server.engine.removed:
        await asyncio.sleep(0.001)


async def test_a_stream_is_served_too_and_all_wait_for_one_fetch(server: Server, hub: Hub) -> None:
    damage(server, await fetched(server, "org/one"), "weights")
    replies = await asyncio.gather(*(server.complete(model="org/one", stream=True) for _ in range(20)))
    assert all(events(reply) for reply in replies)
    assert hub.num_fetched[f"org/one/{WEIGHTS}"] == 2


async def test_another_failure_fetches_nothing(server: Server, hub: Hub) -> None:
    await fetched(server, "org/one")
    server.engine.error = "the engine gives up"
    assert "the engine gives up" in (await server.complete(model="org/one")).text
    assert hub.num_fetched[f"org/one/{WEIGHTS}"] == 1


async def test_a_disk_that_damages_all_is_not_tried_for_ever(
    server: Server, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fetched(server, "org/one")
    monkeypatch.setattr(server.registry, "is_intact", lambda _: False)
    server.engine.error = "damaged in layer 1"
    assert "damaged in layer 1" in (await server.complete(model="org/one")).text
    assert hub.num_fetched[f"org/one/{WEIGHTS}"] == 2


async def test_a_source_that_has_it_no_more_is_said(server: Server, hub: Hub) -> None:
    damage(server, await fetched(server, "org/one"), "weights")
    (hub.root / "org" / "one").rename(hub.root / "org" / "gone")
    reply = await server.complete(model="org/one")
    assert reply.status_code == 404
    assert "no repository org/one" in reply.text


@pytest.mark.parametrize("is_new", [False, True])
async def test_what_a_client_has_loaded_comes_back_in_its_revision_or_not_at_all(
    server: Server, hub: Hub, adapters_dir: Path, is_new: bool
) -> None:
    assert (await server.post(LOAD, lora_name="mine", lora_path="hub:org/one")).status_code == 200
    damage(server, server.registry.get("mine"), "weights")
    if is_new:
        (hub.root / "org/one" / WEIGHTS).write_bytes((adapters_dir / "adapter-00001" / WEIGHTS).read_bytes())
    reply = await server.complete(model="mine")
    assert reply.status_code == (502 if is_new else 200)
    assert ("has no such revision" in reply.text) == is_new


async def test_a_restricted_one_leaves_and_comes_with_the_next_token(server: Server, hub: Hub) -> None:
    hub.tokens["org/one"] = "sesame"
    body = {"inputs": "x", "parameters": {"adapter_id": "org/one", "api_token": "sesame"}}
    assert (await server.post("/generate", **body)).status_code == 200
    damage(server, server.registry.get("org/one"), "weights")
    reply = await server.post("/generate", **body)
    assert (reply.status_code, "ask again" in reply.text) == (503, True), reply.text
    assert (await server.post("/generate", **body)).status_code == 200
