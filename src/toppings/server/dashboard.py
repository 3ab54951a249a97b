"""`/dashboard`: the page, and what it is fed."""

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from toppings.dashboard.feed import WHY_FULL, Feed
from toppings.dashboard.page import (
    ADAPTERS,
    DATA,
    DATA_HEADERS,
    EVENTS,
    HEADERS,
    INDEX,
    PAGE,
    STATIC,
    Search,
    assets,
)
from toppings.server.auth import tenant_of
from toppings.server.catalogue import records_of
from toppings.server.errors import ApiError, json_response, unavailable
from toppings.server.exchange import exchange_of
from toppings.server.methods import is_head
from toppings.server.readings import adapter_row
from toppings.server.state import state_of
from toppings.server.streams import EventStream

router = APIRouter(include_in_schema=False)


@router.get(PAGE)
async def page() -> Response:
    return _asset(INDEX)


@router.get(STATIC)
async def asset(asset: str) -> Response:
    return _asset(asset)


@router.get(EVENTS)
async def events(request: Request) -> Response:
    """How things are, and what changes, as server-sent events."""
    feed = _feed_of(request)
    if is_head(request.scope):  # as the answer would begin
        return Response(headers=DATA_HEADERS, media_type="text/event-stream")
    exchange = exchange_of(request.scope)
    if (viewer := feed.enter(exchange.tenant or exchange.client)) is None:
        raise unavailable(WHY_FULL)
    return EventStream(feed.events(viewer), feed.viewing(viewer), headers=DATA_HEADERS)


@router.get(DATA)
async def data(request: Request) -> Response:
    """How things are, once."""
    return Response(await _feed_of(request).latest(), headers=DATA_HEADERS, media_type="application/json")


@router.get(ADAPTERS)
async def find_adapters(request: Request) -> Response:
    """Some of the registered adapters, by name."""
    try:
        search = Search.of(request.query_params)
    except ValueError as error:
        raise ApiError(400, str(error)) from error
    state = state_of(request)
    records = {record.name: record for record in await records_of(state, tenant_of(request))}
    num_found, names = await asyncio.to_thread(search.page, list(records))
    engine = await request.app.state.readings.engine()
    ids = {records[name].adapter_id for name in names}
    places = {} if engine is None else {s.adapter_id: s for s in engine.adapters if s.adapter_id in ids}
    rows = [adapter_row(name, places.get(records[name].adapter_id)) for name in names]
    return json_response({"num_found": num_found, "rows": rows}, headers=DATA_HEADERS)


def _asset(name: str) -> Response:
    found = assets().get(name)
    if found is None:
        raise HTTPException(404)
    return Response(found.content, headers=HEADERS, media_type=found.content_type)


def _feed_of(request: Request) -> Feed:
    feed: Feed = request.app.state.feed
    return feed
