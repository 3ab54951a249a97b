"""Sends requests and measures them where the client stands."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import aiohttp

from toppings.lab.http.apis import Api, RefusedError, StreamedAnswer, reason_of
from toppings.lab.outcome import Outcome, PlannedCall

MAX_REASON_CHARS = 300
IDLE_CONNECTION_S = 3.0  # below what servers keep idle connections for, so that few are found closed


class LoadClient:
    """Sends calls to the server at `url`, any number at once; an async context manager."""

    def __init__(self, url: str, api: Api, *, api_key: str = "", timeout_s: float = 300.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}; it must start with http:// or https://")
        self.url = url.rstrip("/")
        self._api = api
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def get(self, route: str) -> Any:
        """A JSON document. Raises ValueError where there is none."""
        try:
            async with self._session.get(self.url + route) as response:
                if response.status != 200:
                    raise ValueError(f"{self.url}{route} answered {response.status}: {await _text(response)}")
                return await response.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ValueError(f"cannot reach {self.url}{route}: {error or type(error).__name__}") from error

    async def send(self, call: PlannedCall) -> Outcome:
        """Whatever goes wrong stands in the outcome; only cancellation is raised."""
        sent_at = time.perf_counter()
        try:
            return await self._send(call, sent_at)
        except TimeoutError:
            reason = f"no whole answer within {self._timeout_s:g} s"
        except (aiohttp.ClientError, RefusedError) as error:
            reason = str(error) or type(error).__name__
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"an event that is not understood: {error!r}"
        return Outcome(call.adapter, sent_at, _ms_since(sent_at), error=reason[:MAX_REASON_CHARS])

    async def _send(self, call: PlannedCall, sent_at: float) -> Outcome:
        answer, ttft_ms = StreamedAnswer(), None
        async with self._session.post(self.url + self._api.route, json=self._api.body(call)) as response:
            if response.status != 200:
                raise RefusedError(f"HTTP {response.status}: {await _text(response)}")
            async for event in _events(response):
                if self._api.read(event, answer):
                    answer.num_events += 1
                    ttft_ms = ttft_ms or _ms_since(sent_at)
        e2e_ms = _ms_since(sent_at)
        if not answer.is_finished:
            raise RefusedError(f"the stream ended early, after {answer.num_events} tokens")
        num_tokens = answer.num_events if answer.num_tokens is None else answer.num_tokens
        return Outcome(call.adapter, sent_at, e2e_ms, ttft_ms, num_tokens, answer.num_prompt_tokens)


async def wait_until_ready(client: LoadClient, poll_s: float = 0.01) -> None:
    """Returns when `/ready` answers 200; for ever otherwise, so give it a timeout."""
    while True:
        try:
            await client.get("/ready")
        except ValueError:
            await asyncio.sleep(poll_s)
        else:
            return


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """JSON objects of server-sent events, with or without a space after the colon, up to the stream's end."""
    async for line in response.content:
        if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
            yield json.loads(data)


async def _text(response: aiohttp.ClientResponse) -> str:
    text = await response.text(errors="replace")
    try:
        return reason_of(json.loads(text))
    except ValueError:
        return text


def _ms_since(instant: float) -> float:
    return (time.perf_counter() - instant) * 1e3
