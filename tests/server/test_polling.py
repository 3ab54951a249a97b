"""What polls, look-ups and chats cost the event loop; `benchmarks/polling.py` measures a real server."""

import threading
import time
from collections.abc import Awaitable, Callable

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.server.conftest import Server
from toppings.adapters import database
from toppings.adapters.records import AdapterRecord
from toppings.adapters.registry import AdapterRegistry
from toppings.chat_template import ChatTemplate
from toppings.messages import AdapterStatus
from toppings.server import metrics

NUM_REGISTERED, NUM_RESIDENT = 10_000, 1_000
SLACK = 4
"""A machine may be so much slower than the ones that the bounds are meant for."""


@pytest.fixture
def many(server: Server) -> Server:
    """Ten thousand rows of one adapter, of which a thousand are on the device and as many are waited for."""
    root = server.state.config.server.adapters
    record = server.registry.register("a", f"{root}/adapter-00000")
    with server.registry._rows.change() as change:
        for i in range(NUM_REGISTERED):
            change.insert({**_columns(record), "name": f"adapter-{i:05}"}, replace=False)
    ids = [each.adapter_id for each in server.registry.list()]
    server.engine.adapters = [
        AdapterStatus(
            adapter_id=adapter_id,
            is_on_host=True,
            device_layers=2 * (index < NUM_RESIDENT),
            num_layers=2,
            num_running=0,
            num_waiting=int(index >= NUM_RESIDENT),
            num_hits=7,
            is_pinned=False,
        )
        for index, adapter_id in enumerate(ids[: 2 * NUM_RESIDENT])
    ]
    return server


def _columns(record: AdapterRecord) -> dict[str, object]:
    return {
        **vars(record),
        "targets": ",".join(record.targets),
        "invocation_tokens": "",
        "merge": "",
        "vocabulary": "",
    }


async def cost_ms(work: Callable[[], Awaitable[object]]) -> float:
    """Of this thread's processor time, at best of several times: what a busy machine adds is not meant."""
    times = []
    for _ in range(8):
        started_at = time.thread_time()
        await work()
        times.append(time.thread_time() - started_at)
    return min(times) * 1e3


async def poll(server: Server, path: str) -> None:
    """The application alone, without a client's work in the same thread."""
    sent: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "path": path},
        **{"raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "headers": []},
        **{"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80)},
    }
    await server.app(scope, receive, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 200


@pytest.mark.parametrize("path", ["/stats", "/metrics", "/health", "/ready"])
async def test_a_poll_costs_the_loop_a_few_milliseconds(many: Server, path: str) -> None:
    assert await cost_ms(lambda: poll(many, path)) < 5 * SLACK


async def test_metrics_are_written_beside_the_loop(many: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    here, threads = threading.get_ident(), []

    def note(registry: CollectorRegistry) -> bytes:
        threads.append(threading.get_ident())
        return generate_latest(registry)

    monkeypatch.setattr(metrics, "generate_latest", note)
    text = (await many.http.get("/metrics")).text
    assert threads
    assert here not in threads
    assert f'toppings:adapters{{tier="registered"}} {NUM_REGISTERED + 1}' in text


async def test_look_ups_do_not_wait_for_a_write(many: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the block the writer's turn is taken, and who waits for it waits longer than a test may."""
    monkeypatch.setattr(database, "LOCK_WAIT_S", 3600.0)
    registry: AdapterRegistry = many.registry
    record = registry.get("adapter-00007")
    with registry._rows.change():
        for path in ("/stats", "/metrics", "/health", "/v1/models"):
            assert (await many.http.get(path)).status_code == 200
        assert (await many.complete(model="adapter-00007", max_tokens=1)).status_code == 200
        assert registry.get_by_id(record.adapter_id) == record


async def test_a_chat_template_costs_the_loop_next_to_nothing(server: Server) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "the test")
    messages = [{"role": "user", "content": "Tell me about the sea. " * 4} for _ in range(20)]
    assert await cost_ms(lambda: server.state.text.chat_text(messages, template)) < 1 * SLACK
