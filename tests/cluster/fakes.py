"""Servers without a model that speak the real routes over real sockets: a Toppings server and a vLLM one.

Each generates the words `t0 t1 ...`, one a chunk, and can be told to misbehave. `python -m
tests.cluster.fakes vllm 0 0` runs one as a process of its own, to be killed; it prints its URL.
"""

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from toppings.messages import AdapterStatus, EngineStats

RANKS = {"small": 8, "large": 64}


@dataclass
class Behaviour:
    """What the server does; may be changed while it runs. `mode`: ok, error, busy, hang, cut. An answer has
    `max_sent` tokens until more may come; None: as many as were asked for."""

    mode: str = "ok"
    stats_status: int = 200
    num_tokens_before_cut: int = 2
    first_token_s: float = 0.0
    token_s: float = 0.0
    is_healthy: bool = True
    max_sent: int | None = None

    async def may_send(self, count: int) -> None:
        while self.max_sent is not None and count > self.max_sent:
            await asyncio.sleep(0.005)


@dataclass
class FakeServer:
    """Common routes. `seen` are the models asked for, with what `headers`; `num_aborted` the streams whose
    client went away."""

    adapters: dict[str, int] = field(default_factory=lambda: dict(RANKS))
    behaviour: Behaviour = field(default_factory=Behaviour)
    base: str = "base"
    seen: list[str] = field(default_factory=list)
    raw_bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_aborted: int = 0
    refuses_loads: bool = False
    running: list[str] = field(default_factory=list)
    extra_running_ranks: list[int] = field(default_factory=list)
    extra_stats: dict[str, Any] = field(default_factory=dict)
    admin_calls: list[dict[str, Any]] = field(default_factory=list)
    prefetched: list[str] = field(default_factory=list)
    max_cpu_loras: int = 1000
    extra_headers: dict[str, str] = field(default_factory=dict)

    def app(self) -> Starlette:
        routes = [
            Route("/v1/completions", self.generate, methods=["POST"]),
            Route("/v1/chat/completions", self.generate, methods=["POST"]),
            Route("/generate", self.generate, methods=["POST"]),
            Route("/generate_stream", self.generate, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        return Starlette(routes=routes + self.own_routes())

    def own_routes(self) -> list[Route]:
        return []

    async def health(self, request: Request) -> Response:
        if self.behaviour.mode == "hang":
            await asyncio.sleep(3600)
        return Response(status_code=200 if self.behaviour.is_healthy else 503)

    async def models(self, request: Request) -> Response:
        names = [
            (self.base, None, "/models/base"),
            *((n, self.base, f"/adapters/{n}") for n in self.adapters),
        ]
        return JSONResponse({"object": "list", "data": [_card(*name) for name in names]})

    async def generate(self, request: Request) -> Response:
        raw = await request.body()
        body = json.loads(raw)
        self.raw_bodies.append(raw)
        self.headers.append(dict(request.headers))
        model = body.get("model") or self.base
        self.seen.append(model)
        match self.behaviour.mode:
            case "hang":
                await asyncio.sleep(3600)
            case "error":
                return _error(500, "InternalServerError", "the engine is broken")
            case "busy":
                return _error(429, "TooManyRequests", "the queue is full", {"Retry-After": "7"})
        if model != self.base and model not in self.adapters:
            text = f"The model `{model}` does not exist. Valid aliases: {self.base}."
            return _error(404, "NotFoundError", text)
        count = body.get("max_tokens") or (body.get("parameters") or {}).get("max_new_tokens") or 4
        path = request.url.path
        if body.get("stream") or path == "/generate_stream":
            events = self.stream(path, model, count)
            return StreamingResponse(events, media_type="text/event-stream", headers=self.extra_headers)
        await asyncio.sleep(self.behaviour.first_token_s + count * self.behaviour.token_s)
        await self.behaviour.may_send(count)
        text = " ".join(f"t{i}" for i in range(count))
        if path == "/generate":
            return JSONResponse({"generated_text": [text], "count_output_tokens": count})
        usage = {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": count + 3}
        chunk = _chunk(path, model, text, "length", is_stream=False)
        return JSONResponse({**chunk, "usage": usage}, headers=self.extra_headers)

    async def stream(self, path: str, model: str, count: int) -> AsyncIterator[bytes]:
        self.running.append(model)
        is_done = False
        try:
            await asyncio.sleep(self.behaviour.first_token_s)
            for i in range(count):
                if self.behaviour.mode == "cut" and i == self.behaviour.num_tokens_before_cut:
                    raise ConnectionResetError("told to break")
                await self.behaviour.may_send(i + 1)
                yield _event(path, model, f"t{i} ", "length" if i == count - 1 else None)
                await asyncio.sleep(self.behaviour.token_s)
            if path != "/generate_stream":
                yield b"data: [DONE]\n\n"
            is_done = True
        finally:
            self.running.remove(model)
            self.num_aborted += not is_done

    async def load(self, request: Request) -> Response:
        body = await request.json()
        self.admin_calls.append(body)
        self.headers.append(dict(request.headers))
        name = body["lora_name"]
        if self.refuses_loads or "missing" in body["lora_path"]:
            text = f"Loading lora {name} failed: No adapter found for {body['lora_path']}"
            return _error(404, "NotFoundError", text)
        if name in self.adapters and not body.get("load_inplace"):
            text = (
                f"The lora adapter '{name}' has already been loaded. "
                "If you want to load the adapter in place, set 'load_inplace' to True."
            )
            return _error(400, "InvalidUserInput", text)
        if name not in self.adapters and len(self.adapters) >= self.max_cpu_loras:
            return _error(500, "InternalServerError", "Call to add_lora method failed: no room")
        self.adapters[name] = 16
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        body = await request.json()
        self.admin_calls.append(body)
        name = body["lora_name"]
        if self.adapters.pop(name, None) is None:
            return _error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        return Response(f"Success: LoRA adapter '{name}' removed successfully.")

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            vllm_metrics(len(self.running), sorted(set(self.running) & set(self.adapters)))
        )


class FakeVllm(FakeServer):
    """Only what vLLM has: no /stats, no /adapters, no /ready."""


class FakeToppings(FakeServer):
    def own_routes(self) -> list[Route]:
        return [
            Route("/stats", self.stats),
            Route("/adapters", self.list_adapters),
            Route("/ready", self.health),
            Route("/adapters/{name:path}/prefetch", self.prefetch, methods=["POST"]),
        ]

    async def prefetch(self, request: Request) -> Response:
        self.prefetched.append(request.path_params["name"])
        return JSONResponse({"name": request.path_params["name"]}, status_code=202)

    async def list_adapters(self, request: Request) -> Response:
        entries = [
            {
                "name": name,
                "path": f"/adapters/{name}",
                "rank": rank,
                "targets": ["q_proj"],
                "bytes": rank << 16,
            }
            for name, rank in self.adapters.items()
        ]
        return JSONResponse({"adapters": entries})

    async def stats(self, request: Request) -> Response:
        if self.behaviour.stats_status != 200:
            return Response(status_code=self.behaviour.stats_status)
        ranks = [self.adapters.get(name, 0) for name in self.running] + self.extra_running_ranks
        statuses = [
            {**asdict(_status(i, self.running.count(name))), "name": name}
            for i, name in enumerate(self.adapters)
        ]
        stats = EngineStats(
            call_id=1,
            num_running=len(ranks),
            num_waiting=0,
            kv_pages_used=len(ranks),
            kv_pages_total=1024,
            page_size=16,
            host_bytes_used=0,
            host_bytes_total=1 << 30,
            device_bytes_used=1 << 20,
            device_bytes_total=1 << 22,
            adapters=[],
            running_ranks=ranks,
            waiting_ranks=[],
            waiting_tokens=0,
            context_tokens=len(ranks) * 8,
            counters={},
        )
        content = {"model": self.base, **asdict(stats), "adapters": statuses}
        content |= {"kv_tokens_total": 16384.0, "kv_tokens_used": 16.0 * len(ranks), "max_lora": 8}
        content |= {"on_device": [*self.adapters], "on_host": [*self.adapters], **self.extra_stats}
        del content["call_id"]
        return JSONResponse(content)


def _status(adapter_id: int, num_running: int) -> AdapterStatus:
    return AdapterStatus(
        adapter_id=adapter_id,
        is_on_host=True,
        device_layers=2,
        num_layers=2,
        num_running=num_running,
        num_waiting=0,
        num_hits=0,
        is_pinned=False,
    )


def _card(name: str, parent: str | None, root: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": None if parent else 2048,
        "permission": [],
    }


def _error(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> Response:
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers)


def _chunk(path: str, model: str, text: str, finish: str | None, *, is_stream: bool) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
    if path == "/v1/chat/completions":
        key = "delta" if is_stream else "message"
        choice[key] = {"role": "assistant", "content": text}
        kind = "chat.completion.chunk" if is_stream else "chat.completion"
    else:
        choice["text"] = text
        kind = "text_completion"
    return {"id": "cmpl-1", "object": kind, "created": int(time.time()), "model": model, "choices": [choice]}


def _event(path: str, model: str, text: str, finish: str | None) -> bytes:
    if path == "/generate_stream":
        token = {"id": 1, "text": text, "logprob": -0.5, "special": False}
        body = {"token": token, "generated_text": None, "finished": finish is not None, "details": None}
        return f"data:{json.dumps(body)}\n\n".encode()
    return f"data: {json.dumps(_chunk(path, model, text, finish, is_stream=True))}\n\n".encode()


def vllm_metrics(num_running: int, running: list[str], waiting: tuple[str, ...] = ()) -> str:
    """Prometheus text as vLLM writes it: HELP and TYPE lines, an engine label, a stale series as well."""
    labels = '{engine="0",model_name="base"}'
    names = f'running_lora_adapters="{",".join(running)}",waiting_lora_adapters="{",".join(waiting)}"'
    return "\n".join(
        [
            "# HELP vllm:num_requests_running Number of requests in model execution batches.",
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{labels} {float(num_running)}",
            f"vllm:num_requests_waiting{labels} 0.0",
            f"vllm:kv_cache_usage_perc{labels} 0.25",
            'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="400"} 1.0',
            'vllm:lora_requests_info{max_lora="4",running_lora_adapters="old",waiting_lora_adapters=""} 15.0',
            f'vllm:lora_requests_info{{max_lora="4",{names}}} 1.7953826323213768e+09',
            "",
        ]
    )


@contextlib.contextmanager
def serving(server: FakeServer, port: int = 0) -> Iterator[str]:
    """The server on a real port, in a thread, while the context is open; gives its URL."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    config = uvicorn.Config(server.app(), log_level="critical", timeout_graceful_shutdown=0)
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        runner.should_exit = runner.force_exit = True
        thread.join(timeout=5)
        listener.close()


def main() -> None:
    server = {"toppings": FakeToppings, "vllm": FakeVllm}[sys.argv[1]]()
    server.behaviour.first_token_s, server.behaviour.token_s = float(sys.argv[2]), float(sys.argv[3])
    port = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    with serving(server, port) as url:
        print(url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
