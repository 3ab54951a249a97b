"""`toppings serve` as a subprocess, from its start to its orderly end."""

import asyncio
import random
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from toppings.access import read_api_key
from toppings.config import Config
from toppings.lab.http.apis import CompletionsApi
from toppings.lab.http.client import LoadClient, wait_until_ready

START_TIMEOUT_S = 600.0
"""Packing many large adapters, or loading them all, may take minutes."""
KILL_AFTER_S = 10.0
NUM_SHOWN_LINES = 8
PORTS = range(10_000, 32_768)
"""Below those that Linux gives to whoever asks for any."""

Command = Callable[[Path], list[str]]


class ServerStartError(ValueError):
    """The server ended or did not become ready; the message holds the last lines that it printed."""


def serve_command(config_file: Path) -> list[str]:
    return [sys.executable, "-m", "toppings", "serve", "--config", str(config_file)]


def free_port() -> int:
    """One that nobody has, and that nobody who asks for any gets until a server listens on it. Raises OSError
    where there is none."""
    for port in random.SystemRandom().sample(PORTS, 1000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free")


def run_dir(config: Config) -> Path:
    """Where the server of this configuration writes its logs."""
    return Path(config.server.log_dir) / config.engine.mode


@asynccontextmanager
async def running_server(config: Config, command: Command = serve_command) -> AsyncIterator[LoadClient]:
    """A client of a server with these settings, ready when this begins and gone when it ends.

    What it prints goes to `console.log` in its log directory, from which an older step log is removed.
    Raises ServerStartError.
    """
    directory = run_dir(config)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "steps.jsonl").unlink(missing_ok=True)
    config_file, console = directory / "bench.yaml", directory / "console.log"
    config_file.touch(mode=0o600)  # it may hold the server's key
    config_file.write_text(config.to_yaml())
    with console.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command(config_file), stdout=output, stderr=asyncio.subprocess.STDOUT
        )
    try:
        url = f"http://{config.server.host}:{config.server.port}"
        api = CompletionsApi(ignores_eos=True)
        key = read_api_key(config.server.api_key, config.server.api_key_file)
        async with LoadClient(url, api, api_key=key) as client:
            await _ready(process, client, console)
            yield client
    finally:
        await _end(process)
        config_file.unlink()


async def _ready(process: asyncio.subprocess.Process, client: LoadClient, console: Path) -> None:
    ready, ended = asyncio.create_task(wait_until_ready(client)), asyncio.create_task(process.wait())
    try:
        await asyncio.wait({ready, ended}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            what = f"ended with exit code {process.returncode}" if ended.done() else "is not ready"
            lines = console.read_text(errors="replace").splitlines()[-NUM_SHOWN_LINES:]
            raise ServerStartError("\n".join([f"the server {what}; it printed:", *lines]))
    finally:
        ready.cancel()
        ended.cancel()
        await asyncio.gather(ready, ended, return_exceptions=True)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(KILL_AFTER_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
