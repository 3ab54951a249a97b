"""A server for the clients: the built-in demo, and an adapter of it for each way of writing calls."""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.tools.stand_ins import FAMILIES  # noqa: E402
from toppings.demo import demo_adapters_dir  # noqa: E402

BASE = "toppings-demo"
ADAPTER = "weather"
START_TIMEOUT_S = 600


def write_adapters(folder: Path) -> None:
    """One adapter of the demo under as many names, each with a chat template of its own."""
    for name, template in FAMILIES.items():
        shutil.copytree(demo_adapters_dir() / ADAPTER, folder / name, dirs_exist_ok=True)
        (folder / name / "chat_template.jinja").write_text(template)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server with these adapters, which ends with the block; its log is in `folder`."""
    write_adapters(folder / "adapters")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"model": "demo", "adapters": folder / "adapters", "state-dir": folder / "state", "port": port}
    command = [sys.executable, "-m", "toppings", "serve", "--host", "127.0.0.1"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        _await_ready(url, server)
        yield url
    finally:
        server.terminate()
        server.wait()


def _await_ready(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Raises RuntimeError where it has ended, or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=10):
            return
        time.sleep(0.5)
    raise RuntimeError("the server did not start; serve.log in the folder says why")
