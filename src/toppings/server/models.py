"""`/v1/models`, and loading and unloading adapters as vLLM, SageMaker and SGLang spell it."""

import uuid
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from toppings.adapters.registry import AdapterRecord
from toppings.server.adapters import AdapterAdmin
from toppings.server.auth import may_change_state
from toppings.server.bodies import TypedJsonRoute
from toppings.server.errors import ApiError, describe, json_response
from toppings.server.protocol import Int, Name, PathText
from toppings.server.state import ServerState, state_of

router = APIRouter()
changing = APIRouter(dependencies=[Depends(may_change_state)], route_class=TypedJsonRoute)


class StrictBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class LoadBody(StrictBody):
    lora_name: Name
    lora_path: PathText
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadBody(StrictBody):
    lora_name: Name
    lora_int_id: Int | None = None


class RegisterBody(StrictBody):
    name: Name
    src: PathText


class SglangLoadBody(StrictBody):
    lora_name: Name
    lora_path: PathText
    pinned: bool = False


class SglangUnloadBody(StrictBody):
    lora_name: Name


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    state = state_of(request)
    adapters = [_adapter_card(state, record) for record in state.registry.list()]
    return json_response({"object": "list", "data": [_base_card(state), *adapters]})


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> Response:
    state = state_of(request)
    if state.target(name).adapter_id is None:
        return json_response(_base_card(state))
    return json_response(_adapter_card(state, state.registry.get(name)))


@changing.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadBody, request: Request) -> Response:
    if body.is_3d_lora_weight:
        raise ApiError(400, "is_3d_lora_weight is not supported; leave it out", param="is_3d_lora_weight")
    await admin_of(request).load(body.lora_name, body.lora_path, in_place=body.load_inplace)
    return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@changing.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadBody, request: Request) -> Response:
    await admin_of(request).unload(body.lora_name)
    return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@changing.post("/adapters")
async def register_adapter(body: RegisterBody, request: Request) -> Response:
    await admin_of(request).load(body.name, body.src)
    return Response(f"Adapter {body.name} registered")


@changing.delete("/adapters/{name:path}")
async def unregister_adapter(name: str, request: Request) -> Response:
    await admin_of(request).unload(name)
    return Response(f"Adapter {name} unregistered")


@changing.post("/load_lora_adapter")
async def load_as_sglang(body: SglangLoadBody, request: Request) -> Response:
    try:
        await admin_of(request).load(body.lora_name, body.lora_path)
        if body.pinned:
            await admin_of(request).pin(body.lora_name, True)
    except Exception as error:
        return _sglang_reply(request, error)
    return _sglang_reply(request, None)


@changing.post("/unload_lora_adapter")
async def unload_as_sglang(body: SglangUnloadBody, request: Request) -> Response:
    try:
        await admin_of(request).unload(body.lora_name)
    except Exception as error:
        return _sglang_reply(request, error)
    return _sglang_reply(request, None)


def admin_of(request: Request) -> AdapterAdmin:
    admin: AdapterAdmin = request.app.state.admin
    return admin


def _sglang_reply(request: Request, error: Exception | None) -> Response:
    """SGLang's controllers know 200 and 400 only."""
    loaded = {record.name: str(record.path) for record in state_of(request).registry.list()}
    message = "" if error is None else describe(error).message
    content = {"success": error is None, "error_message": message, "loaded_adapters": loaded}
    return json_response(content, 200 if error is None else 400)


def _base_card(state: ServerState) -> dict[str, Any]:
    root, info = state.model_path, state.client.info
    return _card(state.base_name, root, None, state.started_at, info.max_model_len)


def _adapter_card(state: ServerState, record: AdapterRecord) -> dict[str, Any]:
    return _card(record.name, str(record.path), state.base_name, int(record.created_at), None)


def _card(
    name: str, root: str, parent: str | None, created: int, max_model_len: int | None
) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "toppings",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [_permission(created)],
    }


def _permission(created: int) -> dict[str, Any]:
    return {
        "id": f"modelperm-{uuid.uuid4().hex}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
