"""A server of one's own for a test or a benchmark, and what is seen of it from outside."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from toppings.lab.http.server import free_port
from toppings.sources.models import DEMO

START_TIMEOUT_S = 300.0
ENGINE, WORKER = "toppings.engine.process", "toppings.assist.worker"
PARTS = {WORKER: "worker", "serve": "server", "route": "router"}
"""Of a program, by a word of the command."""
STAYS = "--stays"
"""Argument of a process that forks the engines."""


class Program:
    """A process that serves HTTP on `port`; its output and temporary files are below `folder`."""

    def __init__(self, folder: Path, port: int, command: Sequence[str]) -> None:
        self.folder = folder
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.output = folder / "output.txt"
        self.command = [sys.executable, "-m", "toppings", *command]
        self.start()

    def start(self) -> None:
        """Returns before it is ready; also after it has ended, on the same port."""
        with open(self.output, "ab") as output:
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

    def kill(self) -> list[psutil.Process]:
        """SIGKILL, to its first process alone; the others that there were."""
        _, *others = self.tree()
        self.process.kill()
        self.process.wait()
        return others


class Served(Program):
    """`toppings serve`; its state and logs, too, are below `folder`, unless others are named."""

    def __init__(
        self, folder: Path, *options: str, log_dir: Path | None = None, state_dir: Path | None = None
    ) -> None:
        port = free_port()
        self.state_dir = state_dir or folder / "state"
        directories = ("--log-dir", str(log_dir or folder / "logs"), "--state-dir", str(self.state_dir))
        super().__init__(
            folder, port, ("serve", "--model", DEMO, "--port", str(port), *directories, *options)
        )

    def load(self, name: str, path: Path, **fields: object) -> tuple[int, Any]:
        return self.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **fields})

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
    """Of processes together. `rss_bytes` counts pages that several share in each of them (`rss_by_part`: by
    what the process is), `shared_bytes` once: the sizes of their nameless shared files."""

    rss_bytes: int
    shared_bytes: int
    num_fds: int
    num_memfds: int
    num_threads: int
    num_processes: int
    rss_by_part: dict[str, int]

    @classmethod
    def of(cls, processes: Sequence[psutil.Process]) -> "Usage":
        total: Counter[str] = Counter()
        parts: Counter[str] = Counter()
        memfds: dict[int, int] = {}
        for process in processes:
            with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                rss_bytes = process.memory_info().rss
                total["rss_bytes"] += rss_bytes
                parts[_part(process)] += rss_bytes
                total["num_threads"] += process.num_threads()
                total["num_fds"] += process.num_fds()
                total["num_processes"] += 1
                memfds |= _memfds(process.pid)
        names = set(cls.__dataclass_fields__) - {"shared_bytes", "num_memfds", "rss_by_part"}
        return cls(
            **{name: total[name] for name in names},
            shared_bytes=sum(memfds.values()),
            num_memfds=len(memfds),
            rss_by_part=dict(parts),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def growth_percent(self, later: "Usage") -> dict[str, float]:
        before, after = self.as_dict(), later.as_dict()
        return {
            name: 100 * (after[name] / value - 1) if value else 100.0 * bool(after[name])
            for name, value in before.items()
            if name != "rss_by_part"
        }


def _part(process: psutil.Process) -> str:
    words = process.cmdline()
    if ENGINE in words:
        return "engine" if process.name() == "toppings-engine" else "forker"
    return next((part for word, part in PARTS.items() if word in words), "sandbox")


def _memfds(pid: int) -> dict[int, int]:
    """The nameless shared files that a process holds: the bytes that each takes, by inode."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if os.readlink(entry).startswith("/memfd:"):
                status = entry.stat()
                found[status.st_ino] = status.st_size
    return found
