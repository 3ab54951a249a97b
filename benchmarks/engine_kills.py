"""An engine that is killed under load, again and again: is every client told, and how soon is there another?

    python benchmarks/engine_kills.py --json kills.json     # ten times, 16 clients
    python benchmarks/engine_kills.py --toy

Starts `toppings serve` with the built-in model. Half of the clients ask for whole answers, half for
streams, one after the other, while the engine's process is killed (signal 9) as soon as it has served all
of them once. What became of each request is one of: answered in full, refused with a reason (503), ended
by an error event in its stream, or lost: no answer, or half of one with no word of it. Recovery is from
the kill to the next answer in full.
"""

import json
import sys
import tempfile
import threading
import time
from collections import Counter
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from hostile.faults import kill, wait_for
from hostile.results import aim, finish
from hostile.served import ENGINE, Served

from toppings.lab.script import make_parser, parse

RECOVERY_S, PATIENCE_S, START_S = 5.0, 120.0, 600.0
PAUSE_S = 0.02
"""Of a client that was refused."""
NUM_TOKENS = 48
OPTIONS = ("--model", "demo", "--num-threads", "1", "--max-engine-restarts", "1000")


class Clients:
    """`num` of them, until they are stopped; `ends` counts what became of their requests."""

    def __init__(self, url: str, num: int) -> None:
        self.ends: Counter[str] = Counter()
        self.lost: list[str] = []
        self.num_answered = [0] * num
        self._url = url
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(num)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            if thread.is_alive():
                self.lost.append("a request that never ended")

    def _run(self, number: int) -> None:
        while not self._is_over.is_set():
            try:
                end = self._ask(is_stream=number % 2 == 0)
            except (OSError, HTTPException, ValueError) as error:
                end = "lost"
                self.lost.append(repr(error)[:200])
            self.ends[end] += 1
            if end == "answered":
                self.num_answered[number] += 1
            else:
                time.sleep(PAUSE_S)

    def _ask(self, *, is_stream: bool) -> str:
        body = {"prompt": "The sea", "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": is_stream}
        headers = {"Content-Type": "application/json"}
        request = Request(f"{self._url}/v1/completions", json.dumps(body).encode(), headers)
        try:
            with urlopen(request, timeout=PATIENCE_S) as answer:
                content = answer.read()
        except HTTPError as error:
            told = json.loads(error.read())["error"]["message"]
            return "refused" if error.code == 503 and told else "lost"
        except URLError as error:
            raise OSError(str(error.reason)) from error
        return _end_of_stream(content) if is_stream else _end_of_whole(content)


def _end_of_whole(content: bytes) -> str:
    return "answered" if json.loads(content)["usage"]["completion_tokens"] == NUM_TOKENS else "lost"


def _end_of_stream(content: bytes) -> str:
    events = [line for line in content.decode().split("\n\n") if line]
    if not events or events[-1] != "data: [DONE]":
        return "lost"
    last = json.loads(events[-2].removeprefix("data: "))
    if "error" in last:
        return "told in its stream"
    return "answered" if last["choices"][0]["finish_reason"] == "length" else "lost"


def main() -> int:
    parser = make_parser(__doc__, "two kills, four clients")
    parser.add_argument("--kills", type=int, default=10, help="in a row")
    parser.add_argument("--clients", type=int, default=16, help="at once")
    args = parse(parser)
    if args.toy:
        args.kills, args.clients = 2, 4
    with tempfile.TemporaryDirectory(prefix="toppings-kills-") as name:
        served = Served(Path(name) / "server", *OPTIONS)
        try:
            served.wait_until_ready(START_S)
            result = measure(served, args.kills, args.clients)
        finally:
            served.close()
    result = {"benchmark": "engine_kills", "kills": args.kills, "clients": args.clients, **result}
    result["aims"] = [] if args.toy else judge(result)
    return finish(result, args.json)


def measure(served: Served, num_kills: int, num_clients: int) -> dict[str, Any]:
    clients = Clients(served.url, num_clients)
    recovery_s = []
    try:
        for _ in range(num_kills):
            recovery_s.append(round(kill_once(served, clients), 3))
    finally:
        clients.stop()
    return {"recovery_s": recovery_s, "requests": dict(clients.ends), "lost": clients.lost[:10]}


def kill_once(served: Served, clients: Clients) -> float:
    """Seconds until somebody was answered whole again."""
    before = list(clients.num_answered)

    def are_served() -> bool:
        return all(now > then for now, then in zip(clients.num_answered, before))

    wait_for(are_served, PATIENCE_S, "all clients are served")
    engine = served.find(ENGINE)
    assert engine is not None
    killed_at = time.perf_counter()
    kill(engine)
    wait_for(lambda: served.find(ENGINE) not in (None, engine), PATIENCE_S, "another is started")
    num_before = sum(clients.num_answered)  # what the first one answered has been read by now
    wait_for(lambda: sum(clients.num_answered) > num_before, PATIENCE_S, "somebody is answered")
    return time.perf_counter() - killed_at


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        aim("requests lost", result["requests"].get("lost", 0), 0),
        aim("longest recovery, s", max(result["recovery_s"]), RECOVERY_S),
    ]


if __name__ == "__main__":
    sys.exit(main())
