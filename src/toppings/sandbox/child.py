"""The program of a sandbox's process: takes jobs from its standard input, a socket, until that closes.

    python -I -S child.py PARENT_PID MEMORY_BYTES DIRECTORIES_OF_LIBRARIES

A frame is its length (uint32) and JSON, both ways: `[kind, cpu_s, arguments]` and `[result, error]`. A job
that takes more processor time than its own ends the process by SIGPROF, whatever it is doing.
"""

import importlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any

PREFIX = struct.Struct("<I")
PARENT_POLL_S = 5.0
JOBS = {
    "match": ("patterns", "match_all"),
    "render": ("templates", "render"),
    "check": ("grammars", "check"),
}
"""Modules are those beside this file, imported when first needed."""


def main() -> None:
    parent_pid, memory_bytes, libraries = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    sys.path += [os.path.dirname(os.path.abspath(__file__)), *libraries]
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent decides when to end
    with socket.socket(fileno=0) as channel:
        while (frame := receive(channel, parent_pid)) is not None:
            reply, is_last = answer(frame)
            channel.sendall(PREFIX.pack(len(reply)) + reply)
            if is_last:
                return


def receive(channel: socket.socket, parent_pid: int) -> bytes | None:
    """The next job; None where the parent has gone, even if another process still holds its end open."""
    while not select.select([channel], [], [], PARENT_POLL_S)[0]:
        if os.getppid() != parent_pid:
            return None
    prefix = _receive_exactly(channel, PREFIX.size)
    return None if prefix is None else _receive_exactly(channel, PREFIX.unpack(prefix)[0])


def _receive_exactly(channel: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = channel.recv(min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


def answer(frame: bytes) -> tuple[bytes, bool]:
    """The reply, and whether the process has grown so large that it had better be replaced."""
    kind, cpu_s, arguments = json.loads(frame)
    module, function = JOBS[kind]
    run = getattr(importlib.import_module(module), function)
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    outcome: list[Any]
    is_last = False
    try:
        outcome = [run(**arguments), None]
        reply = json.dumps(outcome).encode()
    except MemoryError:
        is_last, reply = True, b'[null, "it needs too much memory"]'
    except Exception as error:  # templates raise what they like
        text = str(error)[:2000] or type(error).__name__
        reply = json.dumps([None, text]).encode()
    signal.setitimer(signal.ITIMER_PROF, 0)
    return reply, is_last


if __name__ == "__main__":
    main()
