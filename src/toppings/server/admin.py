"""What an operator looks at and turns: adapters and their places, pins, health, statistics, metrics."""

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from toppings import __version__
from toppings.adapters.merges import Merge
from toppings.adapters.registry import AdapterRecord, AdapterRegistry
from toppings.engine.client import EngineDeadError
from toppings.messages import AdapterStatus, EngineStats
from toppings.server.auth import may_change_state, tenant_of
from toppings.server.catalogue import encode_all, records_of, told_path
from toppings.server.errors import json_response
from toppings.server.metrics import is_resident, lora_lists
from toppings.server.models import admin_of
from toppings.server.report import make_report
from toppings.server.state import ServerState, state_of

USE = frozenset({"hits", "running", "waiting"})
"""What a row of `GET /adapters` tells of everybody's requests."""

router = APIRouter()
changing = APIRouter(dependencies=[Depends(may_change_state)])


@router.get("/health")
@router.get("/healthz")
@router.get("/ping")
@router.post("/ping")
async def health(request: Request) -> Response:
    """Whether there is an engine: 503 with the reason while it is replaced, or when none will be."""
    state = state_of(request)
    if not state.client.is_alive:
        return json_response({"status": state.down_reason}, 503)
    return json_response({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether new requests are taken: not while the server shuts down."""
    state_of(request).check_open()
    return json_response({"status": "ready"})


@router.get("/version")
async def version() -> Response:
    return json_response({"version": __version__})


@router.get("/stats")
async def stats(request: Request) -> Response:
    state = state_of(request)
    engine = await state.client.stats()
    running, waiting = lora_lists(engine)
    ids = {*running, *waiting, *(each.adapter_id for each in engine.adapters)}
    names = {adapter_id: state.name_of(adapter_id) for adapter_id in ids}
    server = {
        "model": state.base_name,
        "mode": state.config.engine.mode,
        "link_gbps": state.config.engine.link_gbps,
        "num_open": state.num_open,
        "num_pending": state.num_waiting,
        "max_queue": state.config.server.max_queue,
        "is_draining": state.is_draining,
        "num_adapters": state.registry.count(),
        "running_adapters": [names[i] for i in running],
        "waiting_adapters": [names[i] for i in waiting],
    }
    info, perf_model, left = state.client.info, state.perf_model, list(state.left)

    def respond() -> Response:
        """Beside the event loop: with thousands of adapters it takes milliseconds."""
        content = msgspec.to_builtins(engine)
        del content["call_id"]
        for fields in content["adapters"]:
            fields["name"] = names[fields["adapter_id"]]
        if engine.merged is not None and engine.merged.adapter_id is not None:
            content["merged"]["name"] = names[engine.merged.adapter_id]
        report = make_report(engine, info, names.__getitem__, perf_model, left=left)
        return json_response({**server, **content, "perf_model": None, **msgspec.to_builtins(report)})

    return await asyncio.to_thread(respond)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    state = state_of(request)
    text = await state.metrics.render(await _stats_or_none(state), state.name_of, state.registry.count())
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/cold_starts")
async def cold_starts(request: Request) -> Response:
    """The latest cold requests, oldest first: what each waited for, and what became of each layer."""
    told = [msgspec.to_builtins(each) for each in state_of(request).cold_starts]
    return json_response({"cold_starts": told})


@router.get("/adapters")
async def list_adapters(request: Request) -> Response:
    state = state_of(request)
    engine = await _stats_or_none(state)
    places = {} if engine is None else {status.adapter_id: status for status in engine.adapters}
    tenant = tenant_of(request)

    def encode(record: AdapterRecord) -> bytes:
        row = _row(record, places.get(record.adapter_id), state.registry)
        if not tenant.is_admin:  # others may use it, too
            row = {name: value for name, value in row.items() if name not in USE}
        return msgspec.json.encode({**row, "path": told_path(record, tenant)})

    rows = await encode_all(await records_of(state, tenant), encode)
    body = await asyncio.to_thread(b",".join, rows)
    return Response(b'{"adapters":[' + body + b"]}", media_type="application/json")


@changing.post("/adapters/{name:path}/pin")
async def pin_adapter(name: str, request: Request) -> Response:
    await admin_of(request).pin(name, True)
    return json_response({"name": name, "is_pinned": True})


@changing.delete("/adapters/{name:path}/pin")
async def unpin_adapter(name: str, request: Request) -> Response:
    await admin_of(request).pin(name, False)
    return json_response({"name": name, "is_pinned": False})


@changing.post("/adapters/{name:path}/prefetch")
async def prefetch_adapter(name: str, request: Request) -> Response:
    await admin_of(request).prefetch(name)
    return json_response({"name": name}, 202)


async def _stats_or_none(state: ServerState) -> EngineStats | None:
    try:
        return await state.client.stats()
    except EngineDeadError:
        return None


def _merge(merge: Merge, registry: AdapterRegistry) -> dict[str, Any]:
    """Of which generations it was made, and which of them are still what their names mean."""
    parts = []
    for part in merge.parts:
        named = registry.find_named(part.name)
        is_current = named is not None and named.adapter_id == part.adapter_id
        told = {"name": part.name, "weight": part.weight, "id": part.adapter_id, "digest": part.digest}
        parts.append({**told, "is_current": is_current})
    options = {"density": merge.density, "majority_sign_method": merge.majority_sign, "seed": merge.seed}
    return {"method": merge.method, **options, "adapters": parts}


def _row(record: AdapterRecord, status: AdapterStatus | None, registry: AdapterRegistry) -> dict[str, Any]:
    row = {
        "name": record.name,
        "id": record.adapter_id,
        "rank": record.rank,
        "step_rank": record.step_rank,
        "targets": list(record.targets),
        "bytes": record.num_bytes,
        "digest": record.digest,
        "merge": None if record.merge is None else _merge(record.merge, registry),
        "is_pinned": record.is_pinned,
        "state": "disk" if status is None else place(status),
    }
    if status is None:
        return {**row, "layers_on_device": 0, "hits": 0, "running": 0, "waiting": 0}
    return {
        **row,
        "layers_on_device": status.device_layers,
        "hits": status.num_hits,
        "running": status.num_running,
        "waiting": status.num_waiting,
    }


def place(status: AdapterStatus) -> str:
    """The fastest tier that holds all of the adapter."""
    if is_resident(status):
        return "device"
    return "host" if status.is_on_host else "disk"
