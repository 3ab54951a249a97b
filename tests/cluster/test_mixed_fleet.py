"""A real Toppings server, a process of its own, beside a stand-in that speaks vLLM's routes and metrics."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.cluster.conftest import Client, Start
from tests.cluster.fakes import FakeVllm, serving
from tests.cluster.test_administration import change
from toppings.synth import PRESETS, AdapterShape, write_adapters, write_model

NAMES = ["adapter-00000", "adapter-00001"]
RANKS = (4, 16)
SIZES = {"kv_cache_bytes": "8MiB", "device_pool_bytes": "4MiB", "host_store_bytes": "8MiB"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed")
    write_model(path / "base", PRESETS["tiny"])
    write_adapters(path / "adapters", path / "base", AdapterShape(ranks=RANKS), count=2)
    return path


@pytest.fixture(scope="module")
def toppings_url(home: Path) -> Iterator[str]:
    places = {"model": home / "base", "adapters": home / "adapters", "state_dir": home / "state"}
    settings = {**SIZES, "port": 0, "num_threads": 1, "log_dir": str(home / "logs")}
    settings |= {name: str(path) for name, path in places.items()}
    (home / "server.json").write_text(json.dumps(settings))  # JSON is YAML
    command = [sys.executable, "-m", "toppings", "serve", "--config", str(home / "server.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            yield next(found[0] for line in lines if (found := re.search(r"http://[\d.:]+", line)))
        finally:
            process.terminate()


async def test_both_kinds_serve_as_one(toppings_url: str, home: Path, start_router: Start) -> None:
    vllm = FakeVllm(adapters=dict.fromkeys(NAMES, 0))
    with serving(vllm) as vllm_url:
        async with start_router(toppings_url, vllm_url, policy="round_robin") as client:
            await _requests_reach_both(client)
            await _what_they_tell_is_read(client)
            await _adapters_are_administered_on_both(client, vllm, str(home / "adapters" / NAMES[1]))


async def _requests_reach_both(client: Client) -> None:
    api = openai.AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0)
    assert [model.id async for model in api.models.list()] == ["base", *NAMES]
    texts = set()
    for _ in range(4):
        options: Any = {"model": NAMES[0], "prompt": "hello", "max_tokens": 4, "temperature": 0}
        whole = await api.completions.create(**options)
        streams = [await api.completions.create(**options, stream=True) for _ in range(2)]
        for stream in streams:
            texts.add("".join([chunk.choices[0].text async for chunk in stream]).strip())
        texts.add(whole.choices[0].text.strip())
    assert len(texts) == 2
    assert "t0 t1 t2 t3" in texts
    assert client.outcomes() == {"answered": 12}


async def _what_they_tell_is_read(client: Client) -> None:
    state = client.router.state
    for upstream in state.upstreams.values():
        await client.router.monitor.check(upstream)
    listed = (await client.json("GET", "/instances"))["instances"]
    assert [each["kind"] for each in listed] == ["toppings", "openai"]
    assert NAMES[0] in listed[0]["adapters_on_device"]
    own, other = (state.fleet.instance(name) for name in ("s0", "s1"))
    assert own.max_num_seqs == 64
    assert (other.kv_tokens_total, other.kv_tokens_used, other.max_adapters) == (6400, 1600, 4)
    for name, rank in zip(NAMES, RANKS):
        assert state.directory.get(name).rank == rank  # told by the one, true of both


async def _adapters_are_administered_on_both(client: Client, vllm: FakeVllm, path: str) -> None:
    load = {"lora_name": "new", "lora_path": path}
    assert await change(client, "load", load) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert "new" in vllm.adapters
    instances = set()
    for _ in range(2):
        async with client.complete("new") as response:
            assert response.status == 200
            instances.add(response.headers["X-Toppings-Instance"])
    assert instances == {"s0", "s1"}
    done = await change(client, "unload", {"lora_name": "new"})
    assert done == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert "new" not in vllm.adapters
    async with client.complete("new") as response:
        assert response.status == 404
