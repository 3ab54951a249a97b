"""One process of a sandbox, seen from its parent: started when first needed, and anew when it has ended."""

import json
import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from toppings.process_state import go_on, is_stopped
from toppings.sandbox import child

CHILD_FILE = Path(child.__file__)
LIBRARIES = ("jinja2", "markupsafe", "llguidance")
LOOK_S = 0.25
"""How often a process that is waited for is looked at."""
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
        self._is_closed = False

    def ask(self, frame: bytes, cpu_s: float) -> bytes:
        """The answer to one frame. Raises ProcessEndedError, TimeoutError; the process has ended then, of
        itself, or by force where somebody has stopped it.
        """
        channel = self._channel if self._is_running() else self._start()
        assert channel is not None
        assert self._process is not None
        go_on(self._process.pid)  # nobody hears whether it is stopped while it has nothing to do
        try:
            channel.settimeout(MAX_WAIT_S)
            channel.sendall(child.PREFIX.pack(len(frame)) + frame)
            deadline = time.monotonic() + cpu_s + MAX_WAIT_S
            size = child.PREFIX.unpack(self._receive(child.PREFIX.size, deadline))[0]
            return self._receive(size, deadline)
        except TimeoutError:
            self.end()
            raise
        except (OSError, EOFError) as error:
            raise ProcessEndedError(self.end()) from error

    def close(self) -> None:
        """Ends the process for good, from any thread; whoever waits for its answer hears of it."""
        self._is_closed = True
        if (process := self._process) is not None:
            process.kill()
            process.wait()

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

    def _receive(self, size: int, deadline: float) -> bytes:
        """Raises EOFError where the process has ended or is stopped, TimeoutError."""
        assert self._channel is not None
        assert self._process is not None
        data = bytearray()
        while len(data) < size:
            left_s = deadline - time.monotonic()
            self._channel.settimeout(max(min(left_s, LOOK_S), 0.001))
            try:
                part = self._channel.recv(min(size - len(data), 1 << 20))
            except TimeoutError:
                if left_s <= LOOK_S:
                    raise
                if is_stopped(self._process.pid):
                    self._process.kill()
                    raise EOFError from None
                continue
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self) -> socket.socket:
        status = self.end()
        if self._is_closed:
            raise ProcessEndedError(status)
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


def _library_dirs() -> list[str]:
    """Where the libraries of templates and grammars are installed; where they are not, those jobs fail."""
    specs = [spec for name in LIBRARIES if (spec := find_spec(name)) is not None]
    return sorted({str(Path(spec.origin).parents[1]) for spec in specs if spec.origin})
