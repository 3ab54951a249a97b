import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import Server


def data_lines(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data:{") for line in lines)
    return [json.loads(line.removeprefix("data:")) for line in lines]


@pytest.fixture
async def loaded(server: Server) -> Server:
    server.registry.register("a", server.state.config.server.adapters + "/adapter-00000")
    return server


async def test_a_lora_dir_gets_a_list_of_one(loaded: Server) -> None:
    reply = (
        await loaded.post("/generate", inputs="abc", parameters={"max_new_tokens": 4}, lora_dir="a")
    ).json()
    assert reply == {"generated_text": ["abc"], "count_output_tokens": 4}
    assert loaded.engine.calls[0].adapter_id == loaded.registry.get("a").adapter_id


async def test_a_lora_dir_may_be_the_adapters_path(loaded: Server) -> None:
    path = loaded.registry.get("a").path
    reply = await loaded.post("/generate", inputs="abc", parameters={}, lora_dir=path)
    assert (reply.status_code, loaded.engine.calls[0].adapter_id) == (
        200,
        loaded.registry.get("a").adapter_id,
    )


async def test_a_lora_id_is_the_registrys(loaded: Server) -> None:
    adapter_id = loaded.registry.get("a").adapter_id
    parameters = {"return_details": True, "max_new_tokens": 2}
    reply = await loaded.post("/generate", inputs="abc", parameters=parameters, lora_id=adapter_id)
    assert [set(token) for token in reply.json()["tokens"]] == [{"id", "text", "logprob"}] * 2


async def test_a_null_lora_dir_is_the_base_in_lightllms_shape(loaded: Server) -> None:
    reply = await loaded.post("/generate", inputs="abc", parameters={}, lora_dir=None)
    assert isinstance(reply.json()["generated_text"], list)


async def test_lightllms_stream_has_one_event_per_token(loaded: Server) -> None:
    body = {"inputs": "abc", "parameters": {"max_new_tokens": 4}, "lora_dir": "a"}
    found = data_lines(await loaded.post("/generate_stream", **body))
    assert [event["finished"] for event in found] == [False, False, False, True]
    assert set(found[0]["token"]) == {"id", "text", "logprob", "special"}
    assert "".join(event["token"]["text"] for event in found) == "abc"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"inputs": "x", "lora_dir": "a"}, 400),
        ({"parameters": {}, "lora_dir": "a"}, 400),
        ({"inputs": "x", "parameters": {"do_sample": 1}, "lora_dir": "a"}, 400),
        ({"inputs": "x", "parameters": {}, "lora_dir": "nope"}, 404),
        ({"inputs": "x", "parameters": {}, "lora_id": 99}, 404),
    ],
)
async def test_lightllms_errors_are_messages(loaded: Server, body: dict[str, object], status: int) -> None:
    for route in ("/generate", "/generate_stream"):
        reply = await loaded.post(route, **body)
        assert (reply.status_code, list(reply.json())) == (status, ["message"])


async def test_lorax_is_the_default(loaded: Server) -> None:
    reply = await loaded.post("/generate", inputs="abc", parameters={"adapter_id": "a", "details": True})
    content = reply.json()
    assert isinstance(content["generated_text"], str)
    assert content["details"]["generated_tokens"] == 20
    assert content["details"]["finish_reason"] == "length"
    assert (reply.headers["x-adapter-id"], reply.headers["x-generated-tokens"]) == ("a", "20")
    assert {"x-total-time", "x-queue-time", "x-time-to-first-token"} <= set(reply.headers)


async def test_lorax_knows_a_name_for_the_base(loaded: Server) -> None:
    for parameters in ({}, {"adapter_id": "__base_model__"}):
        await loaded.post("/generate", inputs="abc", parameters=parameters)
    assert [call.adapter_id for call in loaded.engine.calls] == [None, None]


async def test_lorax_samples_only_when_asked(loaded: Server) -> None:
    for parameters in ({}, {"do_sample": True}, {"temperature": 0.5}):
        await loaded.post("/generate", inputs="abc", parameters=parameters)
    assert [call.sampling.temperature for call in loaded.engine.calls] == [0.0, 1.0, 0.5]


async def test_loraxs_stream_ends_with_the_whole_text(loaded: Server) -> None:
    body = {"inputs": "abc", "parameters": {"adapter_id": "a", "max_new_tokens": 4, "details": True}}
    found = data_lines(await loaded.post("/generate_stream", **body))
    assert [event["generated_text"] for event in found] == [None, None, None, "abc"]
    assert found[-1]["details"]["generated_tokens"] == 4


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"parameters": {}}, 422, "validation"),
        ({"inputs": "x", "parameters": {"max_new_tokens": 0}}, 422, "validation"),
        ({"inputs": "x", "parameters": {"adapter_source": "hub"}}, 422, "validation"),
        ({"inputs": "x", "parameters": {"merged_adapters": {"ids": []}}}, 422, "validation"),
        ({"inputs": "x", "parameters": {"watermark": True}}, 422, "validation"),
        ({"inputs": "x", "parameters": {"adapter_id": "nope"}}, 424, "generation"),
    ],
)
async def test_loraxs_errors_have_their_type(
    loaded: Server, body: dict[str, object], status: int, kind: str
) -> None:
    for route in ("/generate", "/generate_stream"):
        reply = await loaded.post(route, **body)
        assert (reply.status_code, reply.json()["error_type"]) == (status, kind)


async def test_a_body_that_is_no_json_is_refused(server: Server) -> None:
    for content in (b"{", b"[]", b""):
        reply = await server.http.post("/generate", content=content)
        assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
