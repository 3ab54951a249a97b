"""The dashboard of a live server with cold starts: how late it is, what it costs, how it looks.

    python benchmarks/dashboard.py --pictures DIR      # needs Chromium for the pictures and the page
    python benchmarks/dashboard.py --toy

Starts `toppings serve` over the built-in demo with random adapters, an emulated link and room for few of them
on the device, with two tenants. Then, in turn:

* cost: processor time of the server's and the engine's main threads with a viewer, less that without one, of
  a server that does nothing else and holds many adapters
* lateness: from a request's sending to the event that tells of it, and, where there is a browser, to the
  page's showing it
* pages: signed in by keyboard, under load, light, dark and as a telephone; errors of the console

Ends in one JSON line with the aims: below 2 % of a core, below 1 s, no error.
"""

import asyncio
import http.client
import json
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from hostile.browser import Page, find_browser, running_browser
from hostile.results import aim, finish
from hostile.served import ENGINE, Served

from toppings.demo import demo_model_dir
from toppings.lab.script import make_parser, parse
from toppings.synth import AdapterShape, write_adapters
from toppings.tenants.keys import add_key

START_TIMEOUT_S = 3600.0
CORE_PERCENT, LATE_S = 2.0, 1.0
NUM_CLIENTS = 4
ADMIN_KEY = "operator"
OPTIONS = (
    *("--num-threads", "1", "--max-model-len", "512", "--kv-cache-bytes", "64MB", "--mode", "cpu_assisted"),
    *("--host-store-bytes", "256MB", "--link-gbps", "0.05"),
)
TENANTS = "tenants:\n  search: {use: ['*'], weight: 2}\n  support: {use: ['*']}\nkeys:\n"
LONG = 200
"""Tokens of a request that is still open when it is shown."""


def main() -> int:
    parser = make_parser(__doc__, "few adapters, short times, no pictures")
    parser.add_argument("--adapters", type=int, default=2000, help="how many are registered")
    parser.add_argument("--resident", type=int, default=400, help="how many requests for others come first")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement of cost")
    parser.add_argument("--repeats", type=int, default=20, help="requests whose lateness is measured")
    parser.add_argument("--pictures", type=Path, help="directory for the pictures")
    args = parse(parser)
    if args.toy:
        args.adapters, args.resident, args.seconds, args.repeats = 4, 2, 0.5, 2
    with tempfile.TemporaryDirectory(prefix="toppings-dashboard-") as name:
        result = run(Path(name), args)
    result["aims"] = [] if args.toy else judge(result)
    return finish({"benchmark": "dashboard", **result}, args.json)


def run(folder: Path, args: Any) -> dict[str, Any]:
    shape = AdapterShape(ranks=(8, 16, 32, 64))
    write_adapters(folder / "adapters", demo_model_dir(), shape, count=args.adapters)
    tenants, key_file = folder / "tenants.yaml", folder / "key"
    tenants.write_text(TENANTS)
    key_file.write_text(ADMIN_KEY)
    key_file.chmod(0o600)
    keys = [add_key(tenants, name).text for name in ("search", "support")]
    chosen = ("--model", str(demo_model_dir()), "--adapters", str(folder / "adapters"))
    access = ("--tenants-file", str(tenants), "--api-key-file", str(key_file))
    pool = ("--device-pool-bytes", f"{max(8, args.resident // 8)}MB")
    served = Served(folder / "server", *OPTIONS, *chosen, *access, *pool)
    try:
        served.wait_until_ready(START_TIMEOUT_S)
        client = Client(served, args.adapters, keys)
        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            list(clients.map(lambda number: client.complete(number, 1), range(args.resident)))
        told = client.data()
        result = {
            "registered": told["adapters"]["registered"],
            "resident": told["adapters"]["device"],
            "cost": cost(served, args.seconds),
            "late_s": lateness(client, args.repeats),
        }
        program = None if args.toy else find_browser()
        if program is not None:
            result["page"] = asyncio.run(look(program, client, args))
        return result
    finally:
        served.close()


class Client:
    """Requests of two tenants, and the operator's looks."""

    def __init__(self, served: Served, num_adapters: int, keys: list[str]) -> None:
        self.served, self._num_adapters, self._keys = served, num_adapters, keys

    def complete(self, number: int, num_tokens: int) -> None:
        body = {
            "model": f"adapter-{number % self._num_adapters:05}",
            "prompt": f"The sea number {number} " * 8,
            "max_tokens": num_tokens,
            "ignore_eos": True,
        }
        with suppress(OSError):
            self._ask("/v1/completions", self._keys[number % len(self._keys)], body)

    def data(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self._ask("/dashboard/data", ADMIN_KEY))
        return told

    def events(self) -> Generator[dict[str, Any]]:
        """What a viewer knows, event by event; one that is closed leaves."""
        connection = http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=60)
        try:
            connection.request("GET", "/dashboard/events", headers={"Authorization": f"Bearer {ADMIN_KEY}"})
            reply = connection.getresponse()
            known: dict[str, Any] = {}
            while line := reply.readline():
                if line.strip():
                    known |= json.loads(line.removeprefix(b"data: "))
                    yield known
        finally:
            connection.close()

    @contextmanager
    def load(self) -> Iterator[None]:
        """Requests for one adapter after the other, until the context ends."""
        numbers, is_over = count(), threading.Event()

        def go_on() -> None:
            while not is_over.is_set():
                self.complete(next(numbers) * 7, 24)

        threads = [threading.Thread(target=go_on) for _ in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            is_over.set()
            for thread in threads:
                thread.join()

    def _ask(self, path: str, key: str, body: object = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(self.served.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            content: bytes = reply.read()
        return content


# --- what it costs ---


def cost(served: Served, seconds: float) -> dict[str, float]:
    """Per cent of a core that one viewer takes of the server and the engine together."""
    engine = served.find(ENGINE)
    assert engine is not None
    pids = (served.process.pid, engine.pid)
    client = Client(served, 1, [])
    alone = busy_percent(pids, seconds)
    is_over, is_looking = threading.Event(), threading.Event()

    def watch() -> None:
        for _ in client.events():
            is_looking.set()
            if is_over.is_set():
                return

    viewer = threading.Thread(target=watch)
    viewer.start()
    is_looking.wait(60)
    watched = busy_percent(pids, seconds)
    is_over.set()
    viewer.join()
    return {"alone_percent": alone, "watched_percent": watched, "viewer_percent": watched - alone}


def busy_percent(pids: tuple[int, ...], seconds: float) -> float:
    """Processor time of these processes' main threads, in per cent of a core."""
    before, started_at = sum(map(main_thread_s, pids)), time.perf_counter()
    time.sleep(seconds)
    return 100 * (sum(map(main_thread_s, pids)) - before) / (time.perf_counter() - started_at)


def main_thread_s(pid: int) -> float:
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


# --- how late it is ---


def lateness(client: Client, repeats: int) -> dict[str, float]:
    """From the sending of a request to the event in which it is open."""
    late_s = []
    stream = client.events()
    next(stream)
    for number in range(repeats):
        sender = threading.Thread(target=client.complete, args=(number, LONG))
        sent_at = time.time()
        sender.start()
        late_s.append(next(time.time() for known in stream if known["now"]["open"]) - sent_at)
        sender.join()
        next(known for known in stream if not known["now"]["open"])
    stream.close()
    return {"mean": sum(late_s) / len(late_s), "max": max(late_s)}


# --- how it looks ---

WATCH = """
window.seen = [];
const shown = [...document.querySelectorAll("#now > div")].find(
  (div) => div.firstChild.textContent === "Open requests");
new MutationObserver(() => seen.push([Date.now() / 1e3, Number(shown.children[1].textContent)]))
  .observe(shown, { characterData: true, childList: true, subtree: true });
"""


async def look(program: str, client: Client, args: Any) -> dict[str, Any]:
    async with running_browser(program) as page:
        await page.look_as(width=1200, height=900)
        await page.open(client.served.url + "/dashboard")
        await page.until("document.activeElement && document.activeElement.id === 'key'")
        await page.write(ADMIN_KEY)
        await page.press("Enter")
        await page.until("document.getElementById('link').textContent === 'live'")
        refused = [each for each in page.problems if "401" in each]
        page.problems = [each for each in page.problems if each not in refused]  # as it asked without a key
        late_s = await page_lateness(page, client, args.repeats)
        with client.load():
            await asyncio.sleep(10)
            await page.until("document.querySelectorAll('#cold details').length > 3")
            if args.pictures:
                await pictures(page, args.pictures)
        await use_by_keyboard(page)
        return {"late_s": late_s, "problems": page.problems}


async def page_lateness(page: Page, client: Client, repeats: int) -> dict[str, float]:
    """From the sending of a request to the page's showing it."""
    await page.until("document.querySelectorAll('#now > div').length > 5")
    await page.value(WATCH)
    late_s = []
    for number in range(repeats):
        sent_at = time.time()
        await asyncio.to_thread(client.complete, number, LONG)
        await page.until(f"seen.some(([at, n]) => at >= {sent_at} && n === 0)")
        shown_at = await page.value(f"seen.find(([at, n]) => at >= {sent_at} && n > 0)?.[0] ?? Infinity")
        late_s.append(float("inf") if shown_at is None else shown_at - sent_at)
    return {"mean": sum(late_s) / len(late_s), "max": max(late_s)}


async def pictures(page: Page, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    await page.value("document.querySelector('#cold details').open = true")
    for name, looks in (
        ("dashboard", {"width": 1200, "height": 1500}),
        ("dashboard_dark", {"width": 1200, "height": 900, "is_dark": True}),
        ("dashboard_phone", {"width": 390, "height": 844, "is_phone": True}),
    ):
        await page.look_as(**looks)  # type: ignore[arg-type]
        await asyncio.sleep(1)
        await page.picture(folder / f"{name}.png")
    await page.look_as(width=1200, height=900)
    await page.value("document.querySelector('#cold-title').scrollIntoView()")
    await page.picture(folder / "dashboard_cold.png")


async def use_by_keyboard(page: Page) -> None:
    """Every control can be reached by Tab, and a search made."""
    await page.value("document.body.focus(), document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        await page.press("Tab")
        reached.add(await page.value("document.activeElement.id || document.activeElement.tagName"))
    assert {"pause", "find"} <= reached, reached
    assert "SUMMARY" in reached, reached
    await page.value("document.getElementById('find').focus()")
    await page.write("adapter-0000")
    await page.press("Enter")
    await page.until("document.getElementById('found').textContent.startsWith('1 to ')")


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    aims = [
        aim("a viewer, per cent of a core", result["cost"]["viewer_percent"], CORE_PERCENT),
        aim("latest event, s", result["late_s"]["max"], LATE_S),
    ]
    if "page" in result:
        aims.append(aim("latest change of the page, s", result["page"]["late_s"]["max"], LATE_S))
        aims.append(aim("errors of the console", len(result["page"]["problems"]), 0))
    return aims


if __name__ == "__main__":
    sys.exit(main())
