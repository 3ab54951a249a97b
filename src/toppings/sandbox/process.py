"""One process of a sandbox, seen from its parent: started when first needed, and anew when it has ended."""

import json
import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from toppings.sandbox import child

CHILD_FILE = Path(child.__file__)
LIBRARIES = ("jinja2", "markupsafe")
MAX_WAIT_S = 10.0
"""Beyond a job's processor time: for a machine so busy that the process is not given it."""


class ProcessEndedError(Exception):
    """The process has ended without an answer; `status` is its exit status, negative for a signal."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


class SandboxProcess:
    """Takes one job at a time."""

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def ask(self, frame: bytes, cpu_s: float) -> bytes:
        """The answer to one frame. Raises ProcessEndedError, TimeoutError; the process has ended then."""
        channel = self._channel if self._is_running() else self._start()
        assert channel is not None
        try:
            channel.settimeout(MAX_WAIT_S)
            channel.sendall(child.PREFIX.pack(len(frame)) + frame)
            deadline = time.monotonic() + cpu_s + MAX_WAIT_S
            size = child.PREFIX.unpack(_receive(channel, child.PREFIX.size, deadline))[0]
            return _receive(channel, size, deadline)
        except TimeoutError:
            self.end()
            raise
        except (OSError, EOFError) as error:
            raise ProcessEndedError(self.end()) from error

    def end(self) -> int:
        """Kills the process if there is one; its exit status, negative for a signal."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is None:
            return 0
        process, self._process = self._process, None
        try:
            return process.wait(timeout=0.5)  # it may be ending by itself, and says why
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self) -> socket.socket:
        self.end()
        mine, theirs = socket.socketpair()
        with theirs:
            arguments = (str(os.getpid()), str(self._memory_bytes), json.dumps(_library_dirs()))
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD_FILE), *arguments],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in ("TZ",) if name in os.environ},
                start_new_session=True,  # a terminal's Ctrl-C and hang-up are the parent's to handle
            )
        self._channel = mine
        return mine


def _receive(channel: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        channel.settimeout(max(deadline - time.monotonic(), 0.001))
        part = channel.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _library_dirs() -> list[str]:
    """Where the libraries of templates are installed; where they are not, none are rendered."""
    specs = [spec for name in LIBRARIES if (spec := find_spec(name)) is not None]
    return sorted({str(Path(spec.origin).parents[1]) for spec in specs if spec.origin})
