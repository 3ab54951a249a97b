"""A stand-in in real time: a task steps it; the routes are those of a Toppings server that routing needs."""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from stand_in.load import adapter_bytes
from stand_in.server import Job, Server
from toppings.cluster.snapshot import RequestSnapshot

BASE = "base"


class HttpServer:
    """A server over HTTP, with every adapter of `ranks` registered. Streaming completions only.

    `lateness_ms`: by how much each step ended after its time; the next step's time is counted from when the
    last should have ended, so being late does not add up.
    """

    def __init__(self, server: Server, ranks: Mapping[str, int]) -> None:
        self.server, self.ranks = server, ranks
        self.lateness_ms: list[float] = []
        self.num_answered = self.num_aborted = 0
        self._tokens: dict[Job, asyncio.Queue[bool]] = {}
        self._work = asyncio.Event()
        self._num_received = 0
        self._perf_model = msgspec.to_builtins(server.model)

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.post("/v1/completions", self.complete),
                web.get("/v1/models", self.list_models),
                web.get("/adapters", self.list_adapters),
                web.get("/stats", self.stats),
                web.get("/health", self.health),
                web.get("/ready", self.health),
            ]
        )
        return app

    async def step_for_ever(self) -> None:
        due = 0.0
        while True:
            step_ms = self.server.start_step()
            if step_ms is None:
                self._work.clear()
                await self._work.wait()
                due = time.perf_counter()
                continue
            due += step_ms / 1e3
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            self.lateness_ms.append((time.perf_counter() - due) * 1e3)
            served, ended = self.server.end_step()
            for job in served:
                self._tokens[job].put_nowait(False)
            for job in ended:
                self._tokens[job].put_nowait(True)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        model = body["model"]
        if model not in self.ranks:
            return _error(404, "NotFoundError", f"The model `{model}` does not exist.")
        if not body.get("stream") or not body.get("ignore_eos") or not isinstance(body["prompt"], list):
            text = "a stand-in answers streams of token ids with ignore_eos only"
            return _error(400, "BadRequestError", text)
        job = self._accept(model, len(body["prompt"]), int(body["max_tokens"]))
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
            await self._stream(request, response, job)
            self.num_answered += 1
            return response
        finally:
            del self._tokens[job]
            if not job.ended_at:
                self.server.abort(job)
                self.num_aborted += 1

    def _accept(self, model: str, prompt_tokens: int, num_tokens: int) -> Job:
        self._num_received += 1
        rank = self.ranks[model]
        request = RequestSnapshot(
            str(self._num_received), model, rank, prompt_tokens, float(num_tokens), adapter_bytes(rank)
        )
        job = Job(request, num_tokens, time.perf_counter() * 1e3)
        self._tokens[job] = asyncio.Queue()
        self.server.waiting.append(job)
        self._work.set()
        return job

    async def _stream(self, request: web.Request, response: web.StreamResponse, job: Job) -> None:
        """One event a token; the answer begins with the first. The last tells why it is the last."""
        token, last = _events(job)
        tokens = self._tokens[job]
        await tokens.get()
        await response.prepare(request)
        for _ in range(job.num_tokens - 1):
            await response.write(token)
            await tokens.get()
        await tokens.get()  # the word that it has ended
        job.ended_at = time.perf_counter() * 1e3
        await response.write(last)
        await response.write_eof()

    async def list_models(self, request: web.Request) -> web.Response:
        cards = [_card(BASE, None), *(_card(name, BASE) for name in self.ranks)]
        return web.json_response({"object": "list", "data": cards})

    async def list_adapters(self, request: web.Request) -> web.Response:
        entries = [
            {"name": name, "path": f"/adapters/{name}", "rank": rank, "bytes": adapter_bytes(rank)}
            for name, rank in self.ranks.items()
        ]
        return web.json_response({"adapters": entries})

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ready"})

    async def stats(self, request: web.Request) -> web.Response:
        """Of what a Toppings server tells here, the part that routers read."""
        report = msgspec.structs.replace(self.server.report(set(self.ranks)), perf_model=self._perf_model)
        return web.json_response(msgspec.to_builtins(report))


def _events(job: Job) -> tuple[bytes, bytes]:
    """The event of a token; that of the last one with the usage and the stream's end."""
    model, num_prompt, num_tokens = job.snapshot.adapter, job.snapshot.prompt_tokens, job.num_tokens
    head: dict[str, Any] = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": model}
    choice = {"index": 0, "text": "tok ", "logprobs": None, "finish_reason": None}
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_tokens}
    usage["total_tokens"] = num_prompt + num_tokens
    last = {**head, "choices": [{**choice, "finish_reason": "length"}]}
    end = {**head, "choices": [], "usage": usage}
    return _event({**head, "choices": [choice]}), _event(last) + _event(end) + b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


def _card(name: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "toppings",
        "root": name,
        "parent": parent,
    }


def _error(status: int, kind: str, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": kind, "code": status}}, status=status)
