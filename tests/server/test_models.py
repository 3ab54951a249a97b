import asyncio
import shutil
from pathlib import Path

import pytest

from tests.server.conftest import Server


@pytest.fixture
async def loaded(server: Server, adapters_dir: Path) -> Server:
    server.registry.register("a0", adapters_dir / "adapter-00000")
    return server


async def load(server: Server, name: str, path: object, **more: object) -> tuple[int, str]:
    reply = await server.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(path), **more)
    return reply.status_code, reply.text


async def test_load_serve_list_unload(server: Server, adapters_dir: Path) -> None:
    path = adapters_dir / "adapter-00001"
    assert await load(server, "a1", path) == (200, "Success: LoRA adapter 'a1' added successfully.")
    assert (await server.complete(model="a1")).json()["model"] == "a1"
    adapter_id = server.registry.get("a1").adapter_id
    assert server.engine.calls[0].adapter_id == adapter_id
    base, card = (await server.http.get("/v1/models")).json()["data"]
    assert (base["id"], base["parent"], base["max_model_len"]) == ("base", None, 128)
    assert (card["id"], card["parent"], card["root"]) == ("a1", "base", str(path))
    assert (await server.http.get("/v1/models/a1")).json()["id"] == "a1"
    reply = await server.post("/v1/unload_lora_adapter", lora_name="a1")
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'a1' removed successfully.")
    assert server.engine.removed == [adapter_id]
    assert (await server.complete(model="a1")).status_code == 404


async def test_load_and_unload_replies_have_no_content_type(server: Server, adapters_dir: Path) -> None:
    body = {"lora_name": "a", "lora_path": str(adapters_dir / "adapter-00000")}
    reply = await server.post("/v1/load_lora_adapter", **body)
    assert "content-type" not in reply.headers


async def test_a_relative_path_is_found_below_a_root(server: Server) -> None:
    assert (await load(server, "a", "adapter-00002"))[0] == 200


async def test_an_unknown_model_is_404_with_the_base_as_alias(server: Server) -> None:
    reply = await server.complete(model="nope")
    message = "The model `nope` does not exist. Valid aliases: base."
    expected = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
    assert (reply.status_code, reply.json()["error"]) == (404, expected)


@pytest.mark.parametrize("body", [{}, {"model": "base"}, {"model": ""}, {"model": None}])
async def test_no_model_means_the_base(server: Server, body: dict[str, object]) -> None:
    assert (await server.complete(**body)).json()["model"] == "base"


LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
TAKEN = (
    "The lora adapter 'a0' has already been loaded. "
    "If you want to load the adapter in place, set 'load_inplace' to True."
)


@pytest.mark.parametrize(
    ("route", "body", "status", "kind", "message"),
    [
        (LOAD, {"lora_name": "", "lora_path": "x"}, 400, "InvalidUserInput",
         "Both 'lora_name' and 'lora_path' must be provided."),
        (LOAD, {"lora_name": "x", "lora_path": ""}, 400, "InvalidUserInput",
         "Both 'lora_name' and 'lora_path' must be provided."),
        (LOAD, {"lora_name": "x"}, 400, "BadRequestError",
         "1 validation error:\n  body.lora_path: Field required"),
        (LOAD, {"lora_name": "a0", "lora_path": "adapter-00000"}, 400, "InvalidUserInput", TAKEN),
        (LOAD, {"lora_name": "base", "lora_path": "adapter-00000"}, 400, "InvalidUserInput",
         "The lora adapter 'base' conflicts with a served base model."),
        (LOAD, {"lora_name": "a9", "lora_path": "xx"}, 404, "NotFoundError",
         "Loading lora a9 failed: No adapter found for xx"),
        (UNLOAD, {"lora_name": ""}, 400, "InvalidUserInput",
         "'lora_name' needs to be provided to unload a LoRA adapter."),
        (UNLOAD, {"lora_name": "zzz"}, 404, "NotFoundError", "The lora adapter 'zzz' cannot be found."),
    ],
)  # fmt: skip
async def test_errors_have_vllms_words(
    loaded: Server, route: str, body: dict[str, object], status: int, kind: str, message: str
) -> None:
    reply = await loaded.post(route, **body)
    error = reply.json()["error"]
    told = error["message"].split("; looked below ")[0]  # what vLLM does not say
    assert (reply.status_code, error["code"], error["type"], told) == (status, status, kind, message)


async def test_a_missing_field_is_named_in_param(server: Server) -> None:
    reply = await server.post(LOAD, lora_name="x")
    assert reply.json()["error"]["param"] == "lora_path"


@pytest.mark.parametrize(
    ("content", "media_type"),
    [("{", "application/json"), ('{"lora_name": "x"}', "text/plain"), ("", "application/json")],
)
async def test_malformed_bodies_are_400(server: Server, content: str, media_type: str) -> None:
    reply = await server.http.post(LOAD, content=content, headers={"content-type": media_type})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "BadRequestError"
    assert reply.json()["error"]["param"] is None


@pytest.mark.parametrize("path", [LOAD, "/v1/unload_lora_adapter", "/load_lora_adapter", "/adapters"])
@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"cookie": "a=b"}])
async def test_what_changes_state_names_the_content_type_it_needs(
    server: Server, path: str, headers: dict[str, str]
) -> None:
    reply = await server.http.post(path, content='{"lora_name": "x"}', headers=headers)
    assert reply.status_code == 400
    assert "Content-Type must be application/json" in reply.json()["error"]["message"]


async def test_a_bad_adapter_is_400_with_the_reason(
    server: Server, adapters_dir: Path, tmp_path: Path
) -> None:
    broken = adapters_dir / "broken"
    shutil.copytree(adapters_dir / "adapter-00000", broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    try:
        status, text = await load(server, "broken", broken)
    finally:
        shutil.rmtree(broken)
    assert status == 400
    assert "Loading lora broken failed" in text
    assert server.registry.count() == 0


@pytest.mark.parametrize("path", ["/etc", "/nonexistent/xx", "../..", "adapter-00000/../../.."])
async def test_paths_outside_the_roots_are_refused_alike(server: Server, path: str) -> None:
    status, text = await load(server, "x", path)
    assert status == 403
    assert "not below" in text


async def test_a_link_out_of_the_roots_is_refused(server: Server, adapters_dir: Path, tmp_path: Path) -> None:
    link = adapters_dir / "link"
    link.symlink_to(tmp_path)
    try:
        assert (await load(server, "x", link))[0] == 403
    finally:
        link.unlink()


async def test_a_reload_serves_the_new_generation_while_the_old_one_drains(
    loaded: Server, adapters_dir: Path
) -> None:
    old_id = loaded.registry.get("a0").adapter_id
    loaded.engine.gate.clear()
    running = asyncio.create_task(loaded.complete(model="a0"))
    while not loaded.engine.calls:
        await asyncio.sleep(0.001)
    assert (await load(loaded, "a0", adapters_dir / "adapter-00001", load_inplace=True))[0] == 200
    new_id = loaded.registry.get("a0").adapter_id
    assert new_id != old_id
    assert loaded.engine.removed == []
    loaded.engine.gate.set()
    assert (await running).status_code == 200
    await loaded.complete(model="a0")
    assert loaded.engine.calls[-1].adapter_id == new_id
    while loaded.engine.removed != [old_id]:
        await asyncio.sleep(0.001)


async def test_unload_waits_for_running_requests_and_refuses_new_ones(loaded: Server) -> None:
    loaded.engine.gate.clear()
    running = asyncio.create_task(loaded.complete(model="a0"))
    while not loaded.engine.calls:
        await asyncio.sleep(0.001)
    unloading = asyncio.create_task(loaded.post(UNLOAD, lora_name="a0"))
    while loaded.registry.count():
        await asyncio.sleep(0.001)
    assert (await loaded.complete(model="a0")).status_code == 404
    assert not unloading.done()
    loaded.engine.gate.set()
    assert (await running).status_code == 200
    assert (await unloading).status_code == 200


async def test_a_request_that_lost_its_adapter_on_the_way_is_404(loaded: Server) -> None:
    loaded.engine.error = "adapter 1 is removed"
    loaded.engine.gate.clear()
    late = asyncio.create_task(loaded.complete(model="a0"))
    while not loaded.engine.calls:
        await asyncio.sleep(0.001)
    loaded.registry.remove("a0")
    loaded.engine.gate.set()
    assert (await late).status_code == 404


async def test_sagemakers_routes_work(server: Server) -> None:
    reply = await server.post("/adapters", name="s/1", src="adapter-00000")
    assert (reply.status_code, reply.text) == (200, "Adapter s/1 registered")
    reply = await server.http.delete("/adapters/s/1")
    assert (reply.status_code, reply.text) == (200, "Adapter s/1 unregistered")


async def test_sglangs_routes_work(server: Server) -> None:
    body = {"lora_name": "g", "lora_path": "adapter-00000", "pinned": True}
    reply = await server.post("/load_lora_adapter", **body)
    assert reply.status_code == 200
    assert list(reply.json()["loaded_adapters"]) == ["g"]
    assert server.registry.get("g").is_pinned
    again = await server.post("/load_lora_adapter", **body)
    assert (again.status_code, again.json()["success"]) == (400, False)
    gone = await server.post("/unload_lora_adapter", lora_name="g")
    assert gone.json() == {"success": True, "error_message": "", "loaded_adapters": {}}


async def test_pins_reach_engine_and_registry(loaded: Server) -> None:
    adapter_id = loaded.registry.get("a0").adapter_id
    assert (await loaded.http.post("/adapters/a0/pin")).status_code == 200
    assert (loaded.engine.pinned, loaded.registry.get("a0").is_pinned) == ({adapter_id: True}, True)
    assert (await loaded.http.delete("/adapters/a0/pin")).status_code == 200
    assert (loaded.engine.pinned, loaded.registry.get("a0").is_pinned) == ({adapter_id: False}, False)


async def test_a_prefetch_reaches_the_engine_and_an_unknown_name_is_refused(loaded: Server) -> None:
    reply = await loaded.http.post("/adapters/a0/prefetch")
    assert (reply.status_code, reply.json()) == (202, {"name": "a0"})
    assert loaded.engine.prefetched == [loaded.registry.get("a0").adapter_id]
    assert (await loaded.http.post("/adapters/nobody/prefetch")).status_code == 404
    assert len(loaded.engine.prefetched) == 1


async def test_a_pin_that_cannot_be_is_refused(loaded: Server) -> None:
    loaded.engine.pin_error = "the pool holds 100 bytes; adapter 1 needs 200"
    reply = await loaded.http.post("/adapters/a0/pin")
    assert reply.status_code == 400
    assert "needs 200" in reply.text
    assert not loaded.registry.get("a0").is_pinned
