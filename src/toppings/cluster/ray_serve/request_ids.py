"""Serve's proxy gives every answer an `X-Request-Id` of its own: the one that the request has as it comes to
the front, the client's or one that Serve has made."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toppings.request_ids import REQUEST_ID

NAME = REQUEST_ID.lower().encode()


class OneRequestId:
    """Around the application: its answer leaves out the id that Serve will add. Where a client's is of no use
    here, the answer has both, that one and ours."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = (NAME, dict(scope["headers"]).get(NAME))

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [pair for pair in message.get("headers", ()) if tuple(pair) != given]
                message = {**message, "headers": kept}
            await send(message)

        await self._app(scope, receive, send_without)
