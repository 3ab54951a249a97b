"""Engines' processes, seen from whoever starts them."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import msgspec

from toppings.config import EngineConfig
from toppings.engine.heartbeat import Pulse, open_lifeline
from toppings.engine.process import MAX_START_BYTES, STAYS, Ended, EngineLog, Start
from toppings.process_state import go_on

EXIT_TIMEOUT_S = 2.0
"""How long a process that was killed may take to go."""


class EngineProcess:
    """One engine's process; it ends with its client, however that ends. `is_of_warm`: what is to fork it has
    done so before."""

    def __init__(self, spawner: "Spawner", pulse: Pulse, *, is_of_warm: bool) -> None:
        self.pulse = pulse
        self.is_of_warm = is_of_warm
        self._spawner = spawner

    @property
    def name(self) -> str:
        return "the engine's process" + (f" {self.pulse.pid}" if self.pulse.pid is not None else "")

    def kill(self) -> None:
        """Of one that has not even begun, whatever was to start it."""
        if self.pulse.pid is None:
            self._spawner.close()
        elif not self.pulse.has_ended:
            with suppress(ProcessLookupError):
                os.kill(self.pulse.pid, signal.SIGKILL)

    def how_it_ended(self) -> str:
        """Of one that has ended, as far as it is known yet."""
        code = self._spawner.exit_code(self.pulse.pid)
        if code is None:
            return f"{self.name} ended"
        return f"{self.name} ended " + (f"by signal {-code}" if code < 0 else f"with exit code {code}")


class Spawner:
    """Starts engines, one after another. With `stays`, one process forks them all (see process.py)."""

    def __init__(self, *, stays: bool) -> None:
        self._stays = stays
        self._has_spawned = False
        self._codes: dict[int, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def prepare(self) -> None:
        """Begins to start the process that is to fork engines: it imports what they need while others do what
        comes before. Raises OSError where there can be none."""
        if self._stays and not self._is_there:
            self._renew()

    @property
    def _is_there(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def spawn(self, config: EngineConfig, address: str, log: EngineLog) -> EngineProcess:
        """Begins to start a process that serves `config` over the ZeroMQ `address`; does not wait for it.

        Raises OSError where there can be none.
        """
        if not (self._stays and self._is_there):
            self._renew()
        is_warm, self._has_spawned = self._has_spawned, True
        assert self._control is not None
        mine, theirs = open_lifeline()
        if is_warm and self._process is not None:
            go_on(self._process.pid)  # nobody hears whether it is stopped while it has nothing to do
        with theirs, suppress(OSError):  # one that has ended is noticed by its lifeline
            message = msgspec.msgpack.encode(Start(config, address, log))
            socket.send_fds(self._control, [message], [theirs.fileno()])
        return EngineProcess(self, Pulse(mine), is_of_warm=is_warm)

    def _renew(self) -> None:
        self.close()
        self._has_spawned = False
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "toppings.engine.process", str(theirs.fileno())]
        self._control = mine
        with theirs:
            self._process = subprocess.Popen(
                [*command, STAYS] if self._stays else command,
                pass_fds=(theirs.fileno(),),
                env=environment,
                stdin=subprocess.DEVNULL,
            )

    def exit_code(self, pid: int | None) -> int | None:
        """Of an engine that has ended; None where it is not known (yet)."""
        if not self._stays:
            return None if self._process is None else self._process.poll()
        if self._control is not None:
            with suppress(OSError):
                while data := self._control.recv(MAX_START_BYTES, socket.MSG_DONTWAIT):
                    ended = msgspec.msgpack.decode(data, type=Ended)
                    self._codes[ended.pid] = os.waitstatus_to_exitcode(ended.status)
        return None if pid is None else self._codes.get(pid)

    def close(self) -> None:
        """Ends the process that forks, or what is left of the engine that it has become."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_TIMEOUT_S)
        self._control = self._process = None
