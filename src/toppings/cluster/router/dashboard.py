"""The router's `/dashboard`: the page, and what it is fed."""

import asyncio
from contextlib import aclosing

from aiohttp import web

from toppings.bad_input import shown
from toppings.cluster.router import replies
from toppings.cluster.router.exchange import account_of
from toppings.cluster.router.middlewares import Handler
from toppings.cluster.router.readings import Readings
from toppings.cluster.router.replies import ApiError, json_response
from toppings.cluster.router.state import RouterState
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


class Dashboard:
    def __init__(self, state: RouterState) -> None:
        self._state = state
        self._readings = Readings(state)
        self.feed = Feed(self._readings.read)

    def routes(self) -> list[tuple[str, str, Handler]]:
        return [
            ("GET", PAGE, self.page),
            ("GET", STATIC, self.page),
            ("GET", EVENTS, self.events),
            ("GET", DATA, self.data),
            ("GET", ADAPTERS, self.find_adapters),
        ]

    async def close(self, app: web.Application) -> None:
        """Streams end: they would hold up the router's end."""
        self.feed.close()

    async def page(self, request: web.Request) -> web.StreamResponse:
        found = assets().get(request.match_info.get("asset", INDEX))
        if found is None:
            raise ApiError(404, f"no route is at {shown(request.path)}", "NotFoundError")
        return web.Response(body=found.content, headers={**HEADERS, "Content-Type": found.content_type})

    async def events(self, request: web.Request) -> web.StreamResponse:
        """How things are, and what changes, as server-sent events."""
        headers = {**DATA_HEADERS, "Content-Type": replies.EVENT_STREAM}
        if request.method == "HEAD":
            return web.Response(headers=headers)
        viewer = self.feed.enter(account_of(request).name or request.remote or "")
        if viewer is None:
            raise replies.unavailable(WHY_FULL, self._state.config.retry_after_s)
        response = web.StreamResponse(headers=headers)
        with self.feed.viewing(viewer):
            async with aclosing(self.feed.events(viewer)) as events:
                async for event in events:
                    if not response.prepared:
                        await response.prepare(request)
                    await response.write(event)
        await response.write_eof()
        return response

    async def data(self, request: web.Request) -> web.StreamResponse:
        """How things are, once."""
        body = await self.feed.latest()
        return web.Response(body=body, headers=DATA_HEADERS, content_type="application/json")

    async def find_adapters(self, request: web.Request) -> web.StreamResponse:
        """Some of the adapters that the servers list, by name."""
        try:
            search = Search.of(request.query)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        names = await asyncio.to_thread(self._readings.adapter_names)
        num_found, page = await asyncio.to_thread(search.page, names)
        rows = [self._readings.adapter_row(name) for name in page]
        return json_response({"num_found": num_found, "rows": rows}, headers=DATA_HEADERS)
