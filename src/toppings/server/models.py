"""`/v1/models`, and loading and unloading adapters as vLLM, SageMaker and SGLang spell it."""

from functools import partial
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from toppings.adapters.merges import CAT, MAX_PARTS, Merge, MergePart
from toppings.adapters.registry import AdapterRecord
from toppings.server.adapters import AdapterAdmin
from toppings.server.auth import check_may_load, may_change_state, tenant_of
from toppings.server.bodies import TypedJsonRoute
from toppings.server.catalogue import (
    Catalogue,
    adapter_card,
    base_card,
    encode_all,
    records_of,
    told_path,
)
from toppings.server.errors import ApiError, describe, json_response
from toppings.server.fields import Int, Name, PathText
from toppings.server.state import state_of
from toppings.tenants.tenant import Tenant

router = APIRouter()
changing = APIRouter(dependencies=[Depends(may_change_state)], route_class=TypedJsonRoute)


class StrictBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class MergePartBody(StrictBody):
    name: Name
    weight: float = 1.0


class MergeBody(StrictBody):
    """Values are checked where the merge is made: `adapters/merges.py`."""

    adapters: Annotated[list[MergePartBody], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    method: Name = CAT
    density: float | None = None
    majority_sign_method: Name | None = None
    seed: Int | None = None

    def to_merge(self) -> Merge:
        """Raises AdapterError."""
        parts = tuple(MergePart(part.name, part.weight) for part in self.adapters)
        return Merge(parts, self.method, self.density, self.majority_sign_method, self.seed)


class LoadBody(StrictBody):
    """Either a place, or what to merge of adapters that are served."""

    lora_name: Name
    lora_path: PathText | None = None
    merge: MergeBody | None = None
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
    catalogue: Catalogue = request.app.state.catalogue
    return Response(await catalogue.models(tenant_of(request)), media_type="application/json")


@router.get("/v1/models/{name:path}")
async def get_model(name: str, request: Request) -> Response:
    state, tenant = state_of(request), tenant_of(request)
    if not tenant.may_see(None if name == state.base_name else name):
        raise state.unknown(name)
    target = state.target(name)
    if target.adapter_id is None:
        return json_response(base_card(state, tenant))
    return json_response(adapter_card(state, state.registry.get_by_id(target.adapter_id), tenant))


@changing.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadBody, request: Request) -> Response:
    if body.is_3d_lora_weight:
        raise ApiError(400, "is_3d_lora_weight is not supported; leave it out", param="is_3d_lora_weight")
    tenant = check_may_load(request, body.lora_name)
    admin, name, in_place = admin_of(request), body.lora_name, body.load_inplace
    if body.merge is None and body.lora_path is None:
        raise ApiError(400, "1 validation error:\n  body.lora_path: Field required", param="lora_path")
    if body.merge is not None and body.lora_path is not None:
        raise ApiError(400, "lora_path and merge were given together; give one of them", param="merge")
    if body.merge is not None:
        record = await admin.merge(name, body.merge.to_merge, in_place=in_place, tenant=tenant)
    else:
        record = await admin.load(name, body.lora_path or "", in_place=in_place, tenant=tenant)
    return _loaded(request, record, f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@changing.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadBody, request: Request) -> Response:
    check_may_load(request, body.lora_name)
    await admin_of(request).unload(body.lora_name)
    return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@changing.post("/adapters")
async def register_adapter(body: RegisterBody, request: Request) -> Response:
    tenant = check_may_load(request, body.name)
    record = await admin_of(request).load(body.name, body.src, tenant=tenant)
    return _loaded(request, record, f"Adapter {body.name} registered")


@changing.delete("/adapters/{name:path}")
async def unregister_adapter(name: str, request: Request) -> Response:
    check_may_load(request, name)
    await admin_of(request).unload(name)
    return Response(f"Adapter {name} unregistered")


@changing.post("/load_lora_adapter")
async def load_as_sglang(body: SglangLoadBody, request: Request) -> Response:
    admin, tenant = admin_of(request), check_may_load(request, body.lora_name, pins=body.pinned)
    try:
        record = await admin.load(body.lora_name, body.lora_path, tenant=tenant)
        if body.pinned:
            try:
                await admin.pin(body.lora_name, True)
            except Exception:
                await admin.unload(body.lora_name)
                raise
    except Exception as error:
        return await _sglang_reply(request, error)
    return await _sglang_reply(request, None, state_of(request).registry.doubt_of(record))


@changing.post("/unload_lora_adapter")
async def unload_as_sglang(body: SglangUnloadBody, request: Request) -> Response:
    check_may_load(request, body.lora_name)
    try:
        await admin_of(request).unload(body.lora_name)
    except Exception as error:
        return await _sglang_reply(request, error)
    return await _sglang_reply(request, None)


def admin_of(request: Request) -> AdapterAdmin:
    admin: AdapterAdmin = request.app.state.admin
    return admin


def _loaded(request: Request, record: AdapterRecord, message: str) -> Response:
    """Controllers read the first line; a second one says what speaks against the adapter."""
    doubt = state_of(request).registry.doubt_of(record)
    return Response(message if doubt is None else f"{message}\nWarning: {doubt}")


async def _sglang_reply(request: Request, error: Exception | None, doubt: str | None = None) -> Response:
    """SGLang's controllers know 200 and 400 only; what is the server's fault stays 5xx."""
    described = None if error is None else describe(error)
    tenant = tenant_of(request)
    records = await records_of(state_of(request), tenant)
    loaded = await encode_all(records, partial(_name_and_path, tenant))
    content = {
        "success": described is None,
        "error_message": "" if described is None else described.message,
        "loaded_adapters": msgspec.Raw(b"{" + b",".join(loaded) + b"}"),
        **({} if doubt is None else {"warning": doubt}),
    }
    is_ours = described is not None and described.status >= 500
    return json_response(content, 200 if described is None else described.status if is_ours else 400)


def _name_and_path(tenant: Tenant, record: AdapterRecord) -> bytes:
    return msgspec.json.encode(record.name) + b":" + msgspec.json.encode(told_path(record, tenant))
