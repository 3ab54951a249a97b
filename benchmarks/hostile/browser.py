"""A headless Chromium, driven over its DevTools protocol: what a page shows, and what it complains of."""

import asyncio
import base64
import itertools
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--disable-extensions", "--disable-background-networking", "--remote-debugging-port=0"),
)
START_S = 60.0
ANSWER_S = 60.0


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab. `problems` are errors of its console, exceptions, and what its policy has kept out."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.problems: list[str] = []
        self._socket = socket
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._listening = asyncio.create_task(self._listen())

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Raises RuntimeError where the browser says that it cannot."""
        number = next(self._ids)
        future = self._calls[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        answer = await asyncio.wait_for(future, ANSWER_S)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, url: str) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def value(self, expression: str) -> Any:
        """Of JavaScript, in the page. Raises RuntimeError where it throws."""
        told = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in told:
            raise RuntimeError(f"{expression}: {told['exceptionDetails']}")
        return told["result"].get("value")

    async def until(self, expression: str, limit_s: float = 60.0) -> Any:
        """The first value of it that is true. Raises TimeoutError."""
        async with asyncio.timeout(limit_s):
            while not (value := await self.value(expression)):
                await asyncio.sleep(0.05)
        return value

    async def press(self, key: str) -> None:
        code = {"Enter": 13, "Tab": 9, " ": 32}[key]
        text = {"Enter": "\r", " ": " "}.get(key, "")
        name = {" ": "Space"}.get(key, key)
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=name,
                windowsVirtualKeyCode=code,
                text=text if kind == "keyDown" else "",
            )

    async def write(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def look_as(
        self, *, width: int, height: int, is_dark: bool = False, is_phone: bool = False
    ) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=is_phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self, file: Path) -> None:
        """Of what is in view, as PNG."""
        told = await self.call("Page.captureScreenshot", format="png", optimizeForSpeed=False)
        file.write_bytes(base64.b64decode(told["data"]))

    async def close(self) -> None:
        self._listening.cancel()
        await self._socket.close()

    async def _listen(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._calls.pop(told["id"]).set_result(told)
            else:
                self._note(told["method"], told.get("params", {}))

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(json.dumps(params["entry"]))


@asynccontextmanager
async def running_browser(program: str) -> AsyncIterator[Page]:
    """An empty tab of a browser that ends with the context. Raises TimeoutError where it does not start."""
    with tempfile.TemporaryDirectory(prefix="toppings-browser-", ignore_cleanup_errors=True) as folder:
        null = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            program, *OPTIONS, f"--user-data-dir={folder}", "about:blank", stdout=null, stderr=null
        )
        try:
            port = await _port_of(Path(folder) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                    tabs = await reply.json(content_type=None)
                [tab] = [each for each in tabs if each["type"] == "page"]
                page = Page(await session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0))
                try:
                    yield page
                finally:
                    await page.close()
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


async def _port_of(file: Path) -> int:
    async with asyncio.timeout(START_S):
        while True:
            with suppress(FileNotFoundError, ValueError, IndexError):
                return int(file.read_text().splitlines()[0])
            await asyncio.sleep(0.05)
