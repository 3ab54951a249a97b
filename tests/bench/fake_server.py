"""A server without a model that the load generator is tried on: in a thread, or as a process in place of
`toppings serve`, where its delays depend on the mode.

`python tests/bench/fake_server.py CONFIG` reads the YAML settings that `toppings serve --config` would read.
"""

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from toppings.adapters.state_lock import StateLock

ADAPTER_BYTES = 1000
PREFILL_S = 0.01
LOAD_S = {"cached": 0.0, "on_demand": 0.03, "pipelined": 0.01, "cpu_assisted": 0.005}


@dataclass
class Script:
    """How requests are answered; for adapters named refused, cut, garbled, hangs and failed, not well.

    No request gets a token before `num_awaited` are open at once.
    """

    first_token_s: float = 0.0
    token_s: float = 0.0
    has_usage: bool = True
    adapters: tuple[str, ...] = ("a", "b")
    link_gbps: float = 0.0
    step_log: Path | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0
    num_misses: int = 0
    num_awaited: int = 0

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/generate_stream", self.generate, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/adapters", self.list_adapters),
                Route("/stats", self.stats),
                Route("/ready", self.ready),
            ]
        )

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"status": "ready"})

    async def models(self, request: Request) -> Response:
        cards: list[dict[str, Any]] = [{"id": "base", "parent": None}]
        return JSONResponse({"data": [*cards, *({"id": name, "parent": "base"} for name in self.adapters)]})

    async def list_adapters(self, request: Request) -> Response:
        return JSONResponse({"adapters": [{"name": name, "bytes": ADAPTER_BYTES} for name in self.adapters]})

    async def stats(self, request: Request) -> Response:
        return JSONResponse({"link_gbps": self.link_gbps, "counters": {"device_misses": self.num_misses}})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        if body["model"] == "refused":
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        return StreamingResponse(self._completion_events(body), media_type="text/event-stream")

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        return StreamingResponse(self._generate_events(body), media_type="text/event-stream")

    async def _completion_events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        name, num_tokens = body["model"], body["max_tokens"]
        async for i in self._tokens(num_tokens):
            if i == 1 and name == "cut":
                return
            if i == 1 and name == "garbled":
                yield "data: {no json\n\n"
            if i == 1 and name == "failed":
                yield _event({"error": {"message": "the engine has died"}})
                return
            if i == 1 and name == "hangs":
                await asyncio.sleep(3600)
            reason = "length" if i == num_tokens - 1 else None
            yield _event({"choices": [{"index": 0, "text": f"t{i}", "finish_reason": reason}]})
        if self.has_usage:
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": num_tokens}
            yield _event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    async def _generate_events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        num_tokens = body["parameters"]["max_new_tokens"]
        async for i in self._tokens(num_tokens):
            if body["lora_dir"] == "failed":
                yield 'data:{"message": "the engine has died"}\n\n'
                return
            event = {"token": {"id": i}, "finished": i == num_tokens - 1}
            yield f"data:{json.dumps(event)}\n\n"

    async def _tokens(self, num_tokens: int) -> AsyncIterator[int]:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            while self.most_open < self.num_awaited:
                await asyncio.sleep(0.005)
            await asyncio.sleep(self.first_token_s)
            self._log_step("prefill", self.first_token_s)
            for i in range(num_tokens):
                if i:
                    await asyncio.sleep(self.token_s)
                    self._log_step("decode", self.token_s)
                yield i
        finally:
            self.num_open -= 1

    def _log_step(self, kind: str, time_s: float) -> None:
        if self.step_log is not None:
            with self.step_log.open("a") as file:
                file.write(json.dumps({"kind": kind, "ms": time_s * 1e3, "load_ms": 0.0}) + "\n")


def _event(content: object) -> str:
    return f"data: {json.dumps(content)}\n\n"


@contextlib.contextmanager
def serving(script: Script) -> Iterator[str]:
    """The URL of a server in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(script.app(), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class ModeScript(Script):
    """Every request is cold but in `cached`, whose device pool must have room for all adapters."""

    def __init__(self, settings: dict[str, Any]) -> None:
        directory = Path(settings["log_dir"]) / settings["mode"]
        names = tuple(sorted(path.name for path in Path(settings["adapters"]).iterdir()))
        load_s = LOAD_S[settings["mode"]] if settings["link_gbps"] else 0.0
        super().__init__(PREFILL_S + load_s, 0.001, adapters=names, step_log=directory / "steps.jsonl")
        self._is_cached = settings["mode"] == "cached"
        assert not self._is_cached or settings["device_pool_bytes"] >= ADAPTER_BYTES * len(names)

    async def complete(self, request: Request) -> Response:
        self.num_misses += not self._is_cached
        return await super().complete(request)


if __name__ == "__main__":
    given = yaml.safe_load(Path(sys.argv[1]).read_text())
    if given["served_model_name"] == "broken":
        raise SystemExit("error: the model is broken")
    home = given["state_dir"] or given["log_dir"]
    lock = StateLock.take(Path(home), "fake server")  # as the real one: held until this process ends
    uvicorn.run(ModeScript(given).app(), host=given["host"], port=given["port"], log_level="error")
