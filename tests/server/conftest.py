import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from huggingface_hub import constants

from tests.fakes import VOCAB_SIZE, FakeEngineClient
from tests.sources.hub_server import Hub, running_hub
from toppings.adapters.layout import BaseShapes
from toppings.adapters.registry import AdapterRegistry
from toppings.config import Config
from toppings.core import MODULES
from toppings.messages import EngineReady
from toppings.server.app import create_app
from toppings.server.state import ServerState
from toppings.synth import AdapterShape, projection_sizes, write_adapters, write_tokenizer
from toppings.text import TextModel


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without weights: shapes and a tokeniser."""
    path = tmp_path_factory.mktemp("model") / "base"
    path.mkdir()
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2}
    (path / "config.json").write_text(json.dumps(shape))
    write_tokenizer(path, VOCAB_SIZE)
    return path


@pytest.fixture(scope="session")
def adapters_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "adapters"
    write_adapters(path, model_dir, AdapterShape(ranks=(4, 8)), count=3)
    return path


@pytest.fixture(scope="session")
def text(model_dir: Path) -> TextModel:
    return TextModel.load(model_dir)


@pytest.fixture
def registry(tmp_path: Path, model_dir: Path) -> Iterator[AdapterRegistry]:
    sizes, num_layers = projection_sizes(model_dir)
    shapes = BaseShapes(num_layers, tuple(sizes[name] for name in MODULES))
    registry = AdapterRegistry(tmp_path / "state", "base", shapes, "float32")
    yield registry
    registry.close()


@pytest.fixture
def hub(tmp_path: Path, adapters_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """`org/one` and `org/two` are adapters."""
    for number, name in enumerate(("one", "two")):
        shutil.copytree(adapters_dir / f"adapter-0000{number}", tmp_path / "hub" / "org" / name)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    with running_hub(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # what HF_ENDPOINT sets when it is imported
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.fixture
def settings() -> dict[str, object]:
    """Overridden by test modules that need others."""
    return {}


@pytest.fixture
def config(model_dir: Path, adapters_dir: Path, settings: dict[str, object]) -> Config:
    return Config.from_settings({"model": str(model_dir), "adapters": str(adapters_dir), **settings})


@pytest.fixture
async def engine() -> FakeEngineClient:
    return FakeEngineClient()


class Server:
    """The application over a fake engine, and an HTTP client in the same process."""

    def __init__(
        self, engine: FakeEngineClient, registry: AdapterRegistry, text: TextModel, config: Config
    ) -> None:
        self.engine = engine
        self.registry = registry
        self.app = create_app(engine, registry, text, config)
        self.http = self.client_from("127.0.0.1")

    @property
    def state(self) -> ServerState:
        state: ServerState = self.app.state.toppings
        return state

    def client_from(self, address: str, **headers: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, client=(address, 5000), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080", headers=headers)

    async def post(self, path: str, **body: object) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def complete(self, prompt: object = "hello", **body: object) -> httpx.Response:
        return await self.post("/v1/completions", prompt=prompt, **body)


@pytest.fixture
async def server(
    engine: FakeEngineClient, registry: AdapterRegistry, text: TextModel, config: Config
) -> AsyncIterator[Server]:
    server = Server(engine, registry, text, config)
    yield server
    await server.http.aclose()


@pytest.fixture
async def url(server: Server) -> AsyncIterator[str]:
    config = uvicorn.Config(server.app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    listening = uvicorn.Server(config)
    serving = asyncio.create_task(listening.serve())
    while not listening.started:
        await asyncio.sleep(0.005)
    port = listening.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    listening.should_exit = True
    await serving


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream that ended as it should."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def says(server: Server, text: str) -> None:
    """The engine's answer to whatever comes, and an end token."""
    tokens = server.state.text.encode(text, add_special_tokens=False)
    server.engine.script = lambda call: [*tokens, 0]


def roomy_engine() -> FakeEngineClient:
    """With room for tools in a prompt."""
    info = EngineReady("base", 2048, 8, VOCAB_SIZE, 16, 64, 1 << 20, 1 << 21)
    return FakeEngineClient(info=info)
