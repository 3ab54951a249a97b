import asyncio
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes import FakeEngineClient
from tests.server.conftest import Server
from tests.waiting import until
from toppings.messages import AdapterStatus, ColdLayer, ColdStart, EngineStats, Span
from toppings.server.cold_starts import MAX_COLD_STARTS
from toppings.server.metrics import lora_lists, num_slots
from toppings.server.schemas.administration import ColdStarts


def status(
    adapter_id: int, *, layers: int = 2, running: int = 0, waiting: int = 0, is_pinned: bool = False
) -> AdapterStatus:
    return AdapterStatus(adapter_id, True, layers, 2, running, waiting, 7, is_pinned)


async def stats(adapters: list[AdapterStatus]) -> EngineStats:
    return await FakeEngineClient(adapters=adapters).stats()


async def samples(server: Server) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = (await server.http.get("/metrics")).text
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


async def test_metrics_have_the_names_that_gateways_read(server: Server) -> None:
    found = await samples(server)
    assert found["vllm:num_requests_waiting", ()] == 2
    assert found["vllm:num_requests_running", ()] == 0
    assert found["vllm:kv_cache_usage_perc", ()] == 0.25
    assert found["vllm:cache_config_info", (("block_size", "16"), ("num_gpu_blocks", "64"))] == 1
    assert found["toppings:device_hits_total", ()] == 5
    assert found["vllm:num_preemptions_total", ()] == 3
    assert found["vllm:prefix_cache_queries_total", ()] == 64
    assert found["vllm:prefix_cache_hits_total", ()] == found["toppings:prefix_cache_hits_total", ()] == 32
    assert found["toppings:adapter_bytes_used", (("tier", "device"),)] == 300


async def test_there_is_one_lora_series_with_disjoint_names(server: Server) -> None:
    ids = [server.registry.register(n, server.state.config.server.adapters + "/adapter-00000").adapter_id
           for n in ("a", "b")]  # fmt: skip
    server.engine.adapters = [status(ids[0], running=1, waiting=1), status(ids[1], layers=0, waiting=3)]
    before = time.time()
    for _ in range(2):
        found = {key: v for key, v in (await samples(server)).items() if key[0] == "vllm:lora_requests_info"}
    [((_, labels), value)] = found.items()
    assert dict(labels) == {"max_lora": "3", "running_lora_adapters": "a", "waiting_lora_adapters": "b"}
    assert value >= before


async def test_idle_residents_are_ready_while_there_is_room() -> None:
    snapshot = await stats([status(1, running=1), status(2)])
    assert (num_slots(snapshot), lora_lists(snapshot)) == (6, ([1, 2], []))


async def test_idle_residents_of_a_full_pool_leave_room_for_others() -> None:
    adapters = [status(1, running=1), status(2), status(3, is_pinned=True), *(status(i) for i in range(4, 9))]
    snapshot = await stats(adapters)
    full = EngineStats(**{f: getattr(snapshot, f) for f in snapshot.__slots__} | {"device_bytes_used": 1000})
    assert num_slots(full) == 8
    assert lora_lists(full) == ([1, 3], [])


async def test_latencies_and_outcomes_are_counted(server: Server) -> None:
    server.engine.cold_start = ColdStart("disk", 10.0, 20.0, 5.0, 2.0)
    adapter = server.state.config.server.adapters + "/adapter-00000"
    server.registry.register("a", adapter)
    await server.complete(model="a", max_tokens=4)
    found = await samples(server)
    assert found["vllm:time_to_first_token_seconds_count", (("model_name", "base"),)] == 1
    assert found["vllm:e2e_request_latency_seconds_count", (("model_name", "base"),)] == 1
    assert found["toppings:ttft_seconds_count", (("start", "cold"),)] == 1
    assert found["toppings:tpt_seconds_count", (("start", "cold"),)] == 1
    assert found["toppings:cold_start_seconds_sum", (("part", "read"), ("tier", "disk"))] == 0.01
    assert found["toppings:cold_start_seconds_sum", (("part", "exposed"), ("tier", "disk"))] == 0.005
    assert found["toppings:requests_total", (("outcome", "length"),)] == 1
    assert found["vllm:generation_tokens_total", (("model_name", "base"),)] == 4


async def test_the_latest_cold_starts_are_told_with_their_names(server: Server) -> None:
    layers = [ColdLayer(Span(1.0, 2.0), 4), ColdLayer(None, 4, 4, 8, Span(2.0, 3.0)), ColdLayer(None, 0)]
    server.engine.cold_start = ColdStart("disk", 10.0, 20.0, 5.0, 2.0, rank=4, layers=layers)
    server.registry.register("a", server.state.config.server.adapters + "/adapter-00000")
    assert (await server.http.get("/cold_starts")).json() == {"cold_starts": []}
    body, mine = {"model": "a", "prompt": "hello", "max_tokens": 2}, {"X-Request-Id": "mine"}
    for _ in range(MAX_COLD_STARTS + 1):
        await server.http.post("/v1/completions", json=body, headers=mine)
    reply = (await server.http.get("/cold_starts")).json()["cold_starts"]
    assert len(reply) == MAX_COLD_STARTS < server.state.cold_starts.num_noted
    assert ColdStarts.model_validate({"cold_starts": reply}, strict=True)
    told = reply[-1]
    assert (told["request_id"], told["adapter"], told["place"]) == ("mine", "a", "both")
    assert told["cold_start"]["rank"] == 4
    assert [layer["load"] for layer in told["cold_start"]["layers"]] == [
        {"from_ms": 1.0, "to_ms": 2.0}, None, None,
    ]  # fmt: skip


async def test_metrics_are_there_without_an_engine(server: Server) -> None:
    server.engine.died.set()
    assert ("toppings:requests_total", (("outcome", "stop"),)) in await samples(server)


async def test_adapters_tell_where_they_are(server: Server) -> None:
    root = server.state.config.server.adapters
    for i, name in enumerate("abc"):
        server.registry.register(name, f"{root}/adapter-0000{i}")
    ids = [server.registry.get(name).adapter_id for name in "abc"]
    server.engine.adapters = [status(ids[0], running=1), status(ids[1], layers=1)]
    rows = (await server.http.get("/adapters")).json()["adapters"]
    assert [(r["name"], r["state"], r["layers_on_device"]) for r in rows] == [
        ("a", "device", 2),
        ("b", "host", 1),
        ("c", "disk", 0),
    ]
    assert (rows[0]["rank"], rows[0]["hits"], rows[0]["running"]) == (4, 7, 1)
    assert rows[0]["step_rank"] == 4
    assert rows[0]["targets"] == ["q_proj", "k_proj", "v_proj"]


async def test_stats_name_the_adapters(server: Server) -> None:
    record = server.registry.register("a", server.state.config.server.adapters + "/adapter-00000")
    server.engine.adapters = [status(record.adapter_id, running=1)]
    reply = (await server.http.get("/stats")).json()
    assert (reply["adapters"][0]["name"], reply["running_adapters"]) == ("a", ["a"])
    assert (reply["num_running"], reply["counters"]["preemptions"]) == (0, 3)


@pytest.mark.parametrize("path", ["/health", "/healthz", "/ready"])
async def test_a_living_server_is_healthy(server: Server, path: str) -> None:
    assert (await server.http.get(path)).status_code == 200


async def test_a_draining_server_takes_nothing_new(server: Server) -> None:
    server.state.is_draining = True
    for reply in (await server.complete(), await server.complete(stream=True)):
        assert (reply.status_code, reply.json()["error"]["type"]) == (503, "ServiceUnavailableError")
        assert reply.headers["Retry-After"] == "1"
    assert (await server.http.get("/ready")).status_code == 503
    assert (await server.http.get("/health")).status_code == 200


async def test_a_cut_request_is_answered_503(server: Server) -> None:
    server.engine.cut.set()
    assert (await server.complete(max_tokens=5)).status_code == 503


class TestQueue:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"max_queue": 2}

    async def test_a_full_queue_is_429_with_retry_after(self, server: Server) -> None:
        server.engine.gate.clear()
        waiting = [asyncio.create_task(server.complete()) for _ in range(2)]
        while server.engine.num_pending < 2:
            await asyncio.sleep(0.001)
        for stream in (False, True):
            reply = await server.complete(stream=stream)
            assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
        server.engine.gate.set()
        assert [(await task).status_code for task in waiting] == [200, 200]
        assert (await server.complete()).status_code == 200

    async def test_a_burst_never_exceeds_the_queue(self, server: Server) -> None:
        server.engine.gate.clear()
        burst = [asyncio.create_task(server.complete(n=1)) for _ in range(10)]
        await until(lambda: sum(task.done() for task in burst) == 8)
        await until(lambda: len(server.engine.calls) == 2)
        server.engine.gate.set()
        assert sorted(r.status_code for r in await asyncio.gather(*burst)) == [200] * 2 + [429] * 8

    async def test_requests_that_run_leave_the_queue(self, server: Server) -> None:
        server.engine.delay_s = 0.01
        running = [asyncio.create_task(server.complete(max_tokens=20)) for _ in range(2)]
        while server.engine.num_pending or len(server.engine.calls) < 2:
            await asyncio.sleep(0.001)
        assert (await server.complete(max_tokens=1)).status_code == 200
        await asyncio.gather(*running)


class TestKey:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"api_key": "sésame"}

    @pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/stats", "/adapters", "/docsx", "/x"])
    async def test_every_route_asks_for_the_key(self, server: Server, path: str) -> None:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}):
            reply = await server.http.get(path, headers=headers)
            assert (reply.status_code, reply.json()["error"]["type"]) == (401, "invalid_request_error")

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
    async def test_the_schemes_name_has_any_case(self, server: Server, scheme: str) -> None:
        headers = httpx.Headers({b"authorization": f"{scheme} sésame".encode()})
        assert (await server.http.get("/v1/models", headers=headers)).status_code == 200

    @pytest.mark.parametrize("given", ["Basic sésame", "sésame", "Bearer", "Bearer sésame x", "Bearersésame"])
    async def test_anything_else_is_401(self, server: Server, given: str) -> None:
        reply = await server.http.get("/v1/models", headers=httpx.Headers({b"authorization": given.encode()}))
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")

    async def test_documents_open_without_it_and_tell_nothing_private(self, server: Server) -> None:
        server.registry.register("mine", server.state.config.server.adapters + "/adapter-00000")
        for path in ("/docs", "/docs/swagger-ui.css", "/openapi.json"):
            reply = await server.http.get(path)
            assert reply.status_code == 200
            assert not any(word in reply.text for word in ("s\u00e9same", "adapter-00000", "/tmp/"))

    @pytest.mark.parametrize("path", ["/health", "/healthz", "/ready"])
    async def test_health_does_not(self, server: Server, path: str) -> None:
        assert (await server.http.get(path)).status_code == 200

    async def test_with_the_key_others_may_change_state(self, server: Server) -> None:
        remote = server.client_from("10.1.2.3")
        headers = httpx.Headers({b"authorization": "Bearer sésame".encode()})
        body = {"lora_name": "a", "lora_path": "adapter-00000"}
        reply = await remote.post("/v1/load_lora_adapter", json=body, headers=headers)
        assert reply.status_code == 200


CHANGING = [
    ("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "adapter-00000"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "a"}),
    ("POST", "/load_lora_adapter", {"lora_name": "a", "lora_path": "adapter-00000"}),
    ("POST", "/unload_lora_adapter", {"lora_name": "a"}),
    ("POST", "/adapters", {"name": "a", "src": "adapter-00000"}),
    ("DELETE", "/adapters/a", None),
    ("POST", "/adapters/a/pin", None),
    ("DELETE", "/adapters/a/pin", None),
    ("POST", "/adapters/a/prefetch", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGING)
async def test_without_a_key_only_loopback_changes_state(
    server: Server, method: str, path: str, body: dict[str, object] | None
) -> None:
    remote = server.client_from("10.1.2.3", **{"x-forwarded-for": "127.0.0.1"})
    reply = await remote.request(method, path, json=body)
    assert (reply.status_code, reply.json()["error"]["type"]) == (403, "PermissionDeniedError")
    assert server.registry.count() == 0


async def test_without_a_key_others_may_generate(server: Server) -> None:
    reply = await server.client_from("10.1.2.3").post("/v1/completions", json={"prompt": "hi"})
    assert reply.status_code == 200


async def test_a_foreign_web_page_changes_nothing(server: Server) -> None:
    reply = await server.http.post("/adapters/a/pin", headers={"origin": "http://elsewhere.example"})
    assert reply.status_code == 403


async def test_ipv6_loopback_is_loopback(server: Server) -> None:
    for address, expected in (("::1", 404), ("::ffff:127.0.0.1", 404), ("::2", 403)):
        assert (await server.client_from(address).post("/adapters/a/pin")).status_code == expected


@pytest.mark.parametrize(("method", "path", "body"), CHANGING)
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "localhost.evil.example", "a@b", "[", ""]
)
async def test_a_name_that_a_web_page_made_mean_this_machine_changes_nothing(
    server: Server, method: str, path: str, body: dict[str, object] | None, host: str
) -> None:
    headers = {"host": host, "origin": f"http://{host}"}
    reply = await server.http.request(method, path, json=body, headers=headers)
    assert (reply.status_code, reply.json()["error"]["type"]) == (403, "PermissionDeniedError")
    assert server.registry.count() == 0


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8080", "[::1]", "[::1]:80"]
)
async def test_names_of_the_loopback_may_change_state(server: Server, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}"}
    assert (await server.http.post("/adapters/a/pin", headers=headers)).status_code == 404


class TestHost:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"host": "Box.lan"}

    async def test_the_configured_host_may_change_state(self, server: Server) -> None:
        reply = await server.http.post("/adapters/a/pin", headers={"host": "box.lan:8080"})
        assert reply.status_code == 404


PREFLIGHT = {"origin": "https://app.example", "access-control-request-method": "POST",
             "access-control-request-headers": "authorization, content-type"}  # fmt: skip


class TestOrigins:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"allowed_origins": '["https://app.example"]', "api_key": "sesame"}

    async def test_browsers_may_ask_beforehand_without_the_key(self, server: Server) -> None:
        reply = await server.http.options("/v1/completions", headers=PREFLIGHT)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        assert "authorization" in reply.headers["access-control-allow-headers"].lower()

    async def test_other_origins_may_not(self, server: Server) -> None:
        reply = await server.http.options(
            "/v1/completions", headers={**PREFLIGHT, "origin": "https://x.example"}
        )
        assert (reply.status_code, "access-control-allow-origin" in reply.headers) == (400, False)

    async def test_a_refusal_can_be_read_by_the_page(self, server: Server) -> None:
        reply = await server.http.post("/v1/completions", headers={"origin": "https://app.example"})
        assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (
            401,
            "https://app.example",
        )


class TestOwnOrigins:
    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {"allowed_origins": ["http://localhost:3000"]}

    @pytest.mark.parametrize(
        ("origin", "status"), [("http://localhost:3000", 404), ("http://localhost:4", 403)]
    )
    async def test_an_allowed_page_may_change_state(self, server: Server, origin: str, status: int) -> None:
        reply = await server.http.post("/adapters/a/pin", headers={"origin": origin})
        assert reply.status_code == status


async def test_by_default_no_page_of_another_origin_reads_answers(server: Server) -> None:
    reply = await server.http.options("/v1/completions", headers=PREFLIGHT)
    assert (reply.status_code, reply.headers["allow"]) == (204, "OPTIONS, POST")
    assert not [name for name in reply.headers if name.startswith("access-control")]
    reply = await server.http.get("/v1/models", headers={"origin": "https://app.example"})
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize("path", ["/health", "/healthz", "/ready"])
async def test_probes_may_ask_for_the_head_only(server: Server, path: str) -> None:
    reply = await server.http.head(path)
    assert (reply.status_code, reply.content) == (200, b"")


@pytest.mark.parametrize("method", ["HEAD", "PUT", "PATCH", "TRACE", "BREW"])
async def test_other_methods_are_405_and_say_which_are_right(server: Server, method: str) -> None:
    for path in ("/v1/completions", "/v1/load_lora_adapter"):
        reply = await server.http.request(method, path)
        assert (reply.status_code, reply.headers["allow"]) == (405, "OPTIONS, POST")
