"""The mixed load of a server that everybody uses.

Clients wait, stream, leave, read slowly, ask for too much or for nonsense; an operator loads and unloads
adapters meanwhile.
"""

import asyncio
import json
import random
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import aiohttp

from hostile.shots import Shot
from hostile.tally import Left, Refused, Tally
from hostile.volley import Reply, exchange, fault_of, reason

BASE = "toppings-demo"
SLOW_CLIENT_S = 3.0
Operation = Callable[["Client", random.Random], Coroutine[Any, Any, None]]


class Client:
    """Sends requests of every kind to one server, and counts in `tally` what became of them; a context."""

    def __init__(
        self,
        url: str,
        tally: Tally,
        *,
        models: list[str],
        folders: list[Path],
        shots: Iterator[Shot] | None = None,
        without: Collection[Operation] = (),
        looks: Sequence[str] = ("/stats", "/metrics", "/adapters", "/v1/models"),
        seed: int = 0,
    ) -> None:
        """`without`: operations of `MIX` that it is not to do; `looks`: what `look` asks for."""
        self.hang_s = 2 * tally.limit_s  # then a client gives up: the request is lost
        self.url = url
        self.tally = tally
        self.models = models
        self.folders = folders
        self.shots = shots
        self.looks = looks
        self._without = without
        self.rng = random.Random(seed)
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=self.hang_s)
        self._http = aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.close()

    async def run(self, stop: asyncio.Event, num_clients: int, pause_s: float) -> None:
        """`num_clients` at once until `stop` is set, each with a random pause of `pause_s` on average."""
        without = {
            *self._without,
            *(() if self.folders else (load, unload, pin, reload)),
            *(() if self.shots else (nonsense,)),
        }
        operations = [each for each, weight in MIX.items() if each not in without for _ in range(weight)]

        async def one(number: int) -> None:
            rng = random.Random(self.rng.random() + number)
            while not stop.is_set():
                await rng.choice(operations)(self, rng)
                await asyncio.sleep(rng.expovariate(1 / pause_s))

        await asyncio.gather(*(one(number) for number in range(num_clients)))

    def body(self, rng: random.Random, **fields: Any) -> dict[str, Any]:
        prompt = " ".join(rng.choices(("sea", "tell", "me", "about", "bread", "night"), k=rng.randint(1, 20)))
        return {
            **{"model": rng.choice(self.models), "prompt": prompt, "max_tokens": rng.randint(1, 24)},
            **{"seed": rng.randrange(1000), **fields},
        }

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        """The content of an answer. Raises Refused."""
        async with self._http.request(method, self.url + path, json=body) as response:
            content = await response.read()
            _check(response, content)
            return json.loads(content) if response.content_type == "application/json" else content

    async def stream(self, path: str, body: object, *, pause_s: float = 0.0, num_lines: int = 10**9) -> None:
        """Reads the events, `pause_s` apart, and leaves after `num_lines`. Raises Refused, Left, EOFError."""
        async with self._http.post(self.url + path, json=body) as response:
            if response.status != 200:
                _check(response, await response.read())
            last, seen = b"", 0
            async for line in response.content:
                if line.strip():
                    last, seen = line, seen + 1
                if seen >= num_lines:
                    raise Left
                await asyncio.sleep(pause_s)
            if b"[DONE]" in last:
                return
            if b'"error"' in last:
                error = json.loads(last.removeprefix(b"data:"))["error"]
                raise Refused(int(error["code"]), str(error["message"]))
            raise EOFError(f"the stream stopped at {last!r}")


def _check(response: aiohttp.ClientResponse, content: bytes) -> None:
    if response.status >= 400:
        raise Refused(response.status, reason(Reply(response.status, "", content)))


async def complete(client: Client, rng: random.Random) -> None:
    async with client.tally.request("whole"):
        body = client.body(rng)
        content = await client.ask("POST", "/v1/completions", body)
        assert 0 < content["usage"]["completion_tokens"] <= body["max_tokens"]
        assert content["model"] == body["model"]


async def chat(client: Client, rng: random.Random) -> None:
    async with client.tally.request("chat, several choices"):
        n = rng.randint(1, 4)
        body = {"model": rng.choice(client.models), "n": n, "max_tokens": 8}
        messages = [{"role": "user", "content": f"Tell me about {rng.randrange(100)}."}]
        content = await client.ask("POST", "/v1/chat/completions", {**body, "messages": messages})
        assert len(content["choices"]) == n


async def stream(client: Client, rng: random.Random) -> None:
    async with client.tally.request("stream"):
        await client.stream("/v1/completions", client.body(rng, stream=True))


async def slow_reader(client: Client, rng: random.Random) -> None:
    async with client.tally.request("stream, read slowly", allowed_s=SLOW_CLIENT_S):
        await client.stream("/v1/completions", client.body(rng, stream=True, max_tokens=24), pause_s=0.05)


async def leave(client: Client, rng: random.Random) -> None:
    async with client.tally.request("stream, left early"):
        body = client.body(rng, stream=True, max_tokens=200, ignore_eos=True, n=rng.randint(1, 3))
        await client.stream("/v1/completions", body, num_lines=rng.randint(1, 10))


async def leave_unread(client: Client, rng: random.Random) -> None:
    """Gone before the first byte of the answer."""
    async with client.tally.request("whole, left early"):
        try:
            async with asyncio.timeout(rng.uniform(0.0, 0.1)):
                await client.ask("POST", "/v1/completions", client.body(rng, max_tokens=100, ignore_eos=True))
        except TimeoutError:
            raise Left from None


async def long_prompt(client: Client, rng: random.Random) -> None:
    async with client.tally.request("long prompt"):
        await client.ask("POST", "/v1/completions", client.body(rng, prompt="word " * rng.randint(100, 400)))


async def several_prompts(client: Client, rng: random.Random) -> None:
    async with client.tally.request("several prompts"):
        prompts = [f"{number} seas" for number in range(rng.randint(2, 8))]
        await client.ask("POST", "/v1/completions", client.body(rng, prompt=prompts, max_tokens=6))


async def too_much(client: Client, rng: random.Random) -> None:
    """Requests that must be refused."""
    async with client.tally.request("too much"):
        choices: list[dict[str, Any]] = (
            [{"max_tokens": 10**6}, {"temperature": -1}, {"top_k": 2**70}, {"stop": ["x"] * 20_000},
             {"model": "nobody"}, {"prompt": "a" * 10**6}, {"n": 10**6}, {"prompt": "a\ud83d"}]
        )  # fmt: skip
        await client.ask("POST", "/v1/completions", client.body(rng, **rng.choice(choices)))


async def nonsense(client: Client, rng: random.Random) -> None:
    """The fuzzer's requests; one that is no whole request is left by its client."""
    assert client.shots is not None
    shot = next(client.shots)
    async with client.tally.request("odd"):
        async with asyncio.timeout(client.hang_s):
            reply = await exchange(client.host, client.port, shot.wire(), shot.is_whole)
        if reply is None:
            if shot.is_whole:
                raise EOFError(f"no answer to {shot.name}")
            raise Left
        if (fault := fault_of(reply)) is not None:
            raise Refused(reply.status if reply.status >= 500 else 599, f"{shot.name}: {fault}")
        if reply.status >= 400:
            raise Refused(reply.status, reason(reply) or "(of the HTTP library)")


async def slow_sender(client: Client, rng: random.Random) -> None:
    """Its body comes in pieces, and sometimes never ends."""
    async with client.tally.request("sent slowly", allowed_s=SLOW_CLIENT_S):
        body = json.dumps(client.body(rng)).encode()
        is_whole = rng.random() < 0.5
        reader, writer = await asyncio.open_connection(client.host, client.port)
        try:
            head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: "
            head += f"application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            pieces = [head.encode(), *(body[place : place + 20] for place in range(0, len(body), 20))]
            for piece in pieces if is_whole else pieces[:-1]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(SLOW_CLIENT_S / 2 / len(pieces))
            if not is_whole:
                raise Left
            async with asyncio.timeout(client.hang_s):
                answer = await reader.read()
            if not answer:
                raise EOFError("closed without an answer")
            status = int(answer.split(maxsplit=2)[1])
            if status != 200:
                raise Refused(status, answer[-200:].decode(errors="replace"))
        finally:
            writer.close()


async def look(client: Client, rng: random.Random) -> None:
    async with client.tally.request("administration"):
        await client.ask("GET", rng.choice(client.looks))


async def load(client: Client, rng: random.Random) -> None:
    async with client.tally.request("load"):
        await client.ask("POST", "/v1/load_lora_adapter", _of(rng.choice(client.folders)))


async def reload(client: Client, rng: random.Random) -> None:
    async with client.tally.request("load in place"):
        body = {**_of(rng.choice(client.folders)), "load_inplace": True}
        await client.ask("POST", "/v1/load_lora_adapter", body)


async def unload(client: Client, rng: random.Random) -> None:
    async with client.tally.request("unload"):
        body = {"lora_name": rng.choice(client.folders).name}
        await client.ask("POST", "/v1/unload_lora_adapter", body)


async def pin(client: Client, rng: random.Random) -> None:
    async with client.tally.request("pin, unpin"):
        path = f"/adapters/{rng.choice(client.folders).name}/pin"
        await client.ask("POST", path)
        await client.ask("DELETE", path)


def _of(folder: Path) -> dict[str, str]:
    return {"lora_name": folder.name, "lora_path": str(folder)}


MIX: dict[Operation, int] = {
    **{complete: 10, stream: 8, chat: 4, several_prompts: 2, long_prompt: 2, slow_reader: 2},
    **{leave: 3, leave_unread: 2, too_much: 2, nonsense: 4, slow_sender: 1, look: 2},
    **{load: 2, reload: 2, unload: 2, pin: 1},
}
"""How often each comes."""
