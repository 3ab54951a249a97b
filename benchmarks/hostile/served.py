"""A server of its own for a test or a benchmark, and what is seen of it from outside."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil

START_TIMEOUT_S = 300.0
STAYS = "--stays"
"""Argument of a process that forks the engines."""


class Served:
    """`toppings serve` as a process; its state, logs and temporary files are below `folder`."""

    def __init__(
        self, folder: Path, *options: str, log_dir: Path | None = None, state_dir: Path | None = None
    ):
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.output = folder / "output.txt"
        self.state_dir = state_dir or folder / "state"
        self.command = [
            *(sys.executable, "-m", "toppings", "serve", "--port", str(self.port)),
            *("--log-dir", str(log_dir or folder / "logs"), "--state-dir", str(self.state_dir)),
            *options,
        ]
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                self.command, stdout=output, stderr=output, env={**os.environ, "TMPDIR": str(self.temporary)}
            )

    def __enter__(self) -> Self:
        try:
            self.wait_until_ready(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self, timeout_s: float = 20.0) -> int | None:
        """Asks it to end; what is left then is killed. Its exit code, None where it had to be killed."""
        tree = self.tree()
        for process in tree:  # one that was stopped would not hear of it
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            for process in tree:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()

    def wait_until_ready(self, timeout_s: float) -> float:
        """Seconds that it took. Raises TimeoutError; RuntimeError where the server has ended."""
        started_at = time.perf_counter()
        while time.perf_counter() - started_at < timeout_s:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}: {self.tail()}")
            with suppress(OSError):
                if self.ask("/ready", timeout_s=5.0)[0] == 200:
                    return time.perf_counter() - started_at
            time.sleep(0.05)
        raise TimeoutError(f"the server was not ready within {timeout_s} s: {self.tail()}")

    def tail(self) -> str:
        return self.output.read_text(errors="replace")[-2000:]

    def ask(
        self, path: str, body: object = None, *, timeout_s: float = 30.0, method: str | None = None
    ) -> tuple[int, Any]:
        """Status and content, as JSON where it is. Raises OSError where there is no answer."""
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(asked, timeout=timeout_s) as reply:
                status, content = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        try:
            return status, json.loads(content)
        except ValueError:
            return status, content.decode(errors="replace")

    def complete(self, model: str = "pirate", prompt: str = "Hello.", **fields: object) -> tuple[int, Any]:
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, **fields}
        return self.ask("/v1/completions", body)

    def load(self, name: str, path: Path, **fields: object) -> tuple[int, Any]:
        return self.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **fields})

    def tree(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def find(self, part: str) -> psutil.Process | None:
        """The process of the tree whose command names `part`. One that stays only to fork others is none."""
        found: dict[int, psutil.Process] = {}
        stays: set[int] = set()
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if any(part in word for word in words):
                    found[process.pid] = process
                    if STAYS in words and process.ppid() not in found:
                        stays.add(process.pid)
        return next((process for pid, process in found.items() if pid not in stays), None)

    def usage(self) -> "Usage":
        return Usage.of(self.tree())

    def wait_until_idle(self, timeout_s: float = 20.0) -> dict[str, Any]:
        """/stats once no request is open. Raises TimeoutError with what still is."""
        deadline = time.perf_counter() + timeout_s
        while True:
            _, stats = self.ask("/stats")
            busy = {name: stats[name] for name in ("num_open", "num_pending", "num_running", "num_waiting")}
            if not any(busy.values()):
                return dict(stats)
            if time.perf_counter() > deadline:
                raise TimeoutError(f"requests are still open: {busy}")
            time.sleep(0.05)


@dataclass(frozen=True)
class Usage:
    """Of a server's processes together; `rss_bytes` counts shared pages in each, `shared_bytes` is theirs."""

    rss_bytes: int
    shared_bytes: int
    num_fds: int
    num_memfds: int
    num_threads: int
    num_processes: int

    @classmethod
    def of(cls, processes: Sequence[psutil.Process]) -> "Usage":
        total = dict.fromkeys(cls.__dataclass_fields__, 0)
        memfds: set[int] = set()
        for process in processes:
            with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                memory = process.memory_info()
                total["rss_bytes"] += memory.rss
                total["shared_bytes"] += memory.shared
                total["num_threads"] += process.num_threads()
                total["num_fds"] += process.num_fds()
                total["num_processes"] += 1
                memfds |= _memfds(process.pid)
        return cls(**{**total, "num_memfds": len(memfds)})

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def _memfds(pid: int) -> set[int]:
    """Inodes of the nameless shared files that a process holds."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if os.readlink(entry).startswith("/memfd:"):
                found.add(entry.stat().st_ino)
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
