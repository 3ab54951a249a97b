"""The lifeline between an engine's process, or a follower's, and whoever started it: a socket that says "I
get on".

The process's end sends its id, then a beat every `BEAT_S`, with the number of beats since its loop last
turned. When either process ends, the other finds the socket closed. Both sides count beats and looks, not the
clock: a machine that was suspended, or a process that was stopped and goes on, has missed nothing.

Silence alone says little on a busy machine, so that it has to last. Where the kernel says that the process is
stopped, waiting longer helps nobody.
"""

import os
import socket
import struct
import threading
import time

from toppings.process_state import is_stopped

BEAT_S = 0.5
LOOK_S = 0.1
"""How often the client looks at the lifeline."""
STOPPED_S = 1.0
"""A process that has missed beats for so long and is stopped is not waited for any longer."""
ORPHAN_GRACE_S = 15.0
"""A process whose starter has gone and that does not end by itself, as in a step that hangs, ends then."""

_BEAT = struct.Struct("<q")


def open_lifeline() -> tuple[socket.socket, socket.socket]:
    """Two ends; messages keep their bounds, and sending never waits."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    return ends


class Heartbeat:
    """The process's end, served by a thread."""

    def __init__(self, lifeline: socket.socket) -> None:
        self.is_orphaned = False
        self._lifeline = lifeline
        self._num_turns = 0
        self._send(os.getpid())
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def turn(self) -> None:
        """To be called by its loop each time round."""
        self._num_turns += 1

    def _run(self) -> None:
        seen, num_beats = -1, 0
        while not self.is_orphaned:
            time.sleep(BEAT_S)
            num_beats = num_beats + 1 if self._num_turns == seen else 0
            seen = self._num_turns
            self._send(num_beats)
        time.sleep(ORPHAN_GRACE_S)
        os._exit(1)

    def _send(self, value: int) -> None:
        try:
            self._lifeline.send(_BEAT.pack(value))
        except BlockingIOError:
            pass  # the client is not reading: it is stopped, or very busy
        except OSError:
            self.is_orphaned = True


class Pulse:
    """The starter's end: `look` takes note of what has come. `pid`: None until the process has begun.

    `silent_s`: since its last beat, `stuck_s`: since its loop last turned; no longer than was looked for.
    """

    def __init__(self, lifeline: socket.socket) -> None:
        self.pid: int | None = None
        self.has_ended = False
        self.silent_s = 0.0
        self.stuck_s = 0.0
        self._lifeline = lifeline
        self._looked_at = time.monotonic()

    def look(self) -> None:
        now = time.monotonic()
        self.silent_s += min(now - self._looked_at, 2 * LOOK_S)
        self._looked_at = now
        while not self.has_ended:
            try:
                data = self._lifeline.recv(_BEAT.size)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data:
                self._note(_BEAT.unpack(data)[0])
            else:
                self.has_ended = True

    def why_given_up(self, silence_bound_s: float) -> str | None:
        """What is said of a process that is not waited for any longer, after its name."""
        if self.silent_s > STOPPED_S and self.pid is not None and is_stopped(self.pid):
            return "was stopped, by a signal or a debugger"
        if self.silent_s > silence_bound_s:
            return f"gave no sign of life for {silence_bound_s:g} s"
        return None

    def _note(self, value: int) -> None:
        self.silent_s = 0.0
        if self.pid is None:
            self.pid = value
        else:
            self.stuck_s = value * BEAT_S

    def close(self) -> None:
        self._lifeline.close()
