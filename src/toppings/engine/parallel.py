"""The lead of a model that is split over several processes: tensor parallelism on one machine.

The lead is the engine's own process. It alone schedules, places adapters and samples; its followers, one for
each other part of the model, repeat its steps and what it does to its device pool, in the same order. The
processes talk to one another twice per layer, to sum, and once per step, to gather logits: through
torch.distributed, NCCL between GPUs, gloo between CPUs. A follower that ends takes the engine with it; one
that is stopped, gives no sign of life (heartbeat.py) or hangs in a step for longer than `step_timeout_s` is
ended.
"""

import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from toppings.adapters.layout import BaseShapes
from toppings.adapters.manager import AdapterManager
from toppings.adapters.mirror import Lead
from toppings.adapters.parts import AdapterParts
from toppings.config import ConfigError, EngineConfig
from toppings.core import Batch, Request
from toppings.engine.faults import FollowerLostError
from toppings.engine.heartbeat import LOOK_S, Pulse, open_lifeline
from toppings.engine.meeting_place import MeetingPlace
from toppings.engine.model_runner import ModelRunner, StepInFlight
from toppings.engine.part_messages import (
    Begin,
    Failed,
    Landed,
    Loaded,
    Start,
    Stop,
    ToFollower,
    encode,
    receive_reply,
    step_of,
)
from toppings.model.config import ModelConfig
from toppings.model.parts import Part, split_model
from toppings.process_state import is_stopped
from toppings.vital import VitalThread

logger = logging.getLogger(__name__)

REPLY_POLL_S = 0.1
EXIT_TIMEOUT_S = 5.0
BLAME_S = 1.0
"""A sum that breaks off is heard of before the end of the process that broke it off."""
HANG_S = 5.0
"""What a follower's end has not broken off by then never ends (NCCL waits on the device)."""
MEETING_TIMEOUT = timedelta(minutes=10)


def _check(config: EngineConfig) -> None:
    """Raises ConfigError where there are fewer GPUs than parts, or a group of processes exists already."""
    size = config.tensor_parallel_size
    if config.device == "cuda" and size > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size is {size}, but this machine shows {torch.cuda.device_count()} CUDA devices"
        )
    if dist.is_initialized():
        raise ConfigError("one process can lead one split model; it has joined torch.distributed already")


def meet(config: EngineConfig, store_path: str, index: int) -> None:
    """Joins torch.distributed's default group as process `index`; returns when all have."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are on one machine
    dist.init_process_group(
        "nccl" if config.device == "cuda" else "gloo",
        init_method=f"file://{store_path}",
        rank=index,
        world_size=config.tensor_parallel_size,
        timeout=MEETING_TIMEOUT,
        device_id=torch.device("cuda", index) if config.device == "cuda" else None,
    )


_Hung = tuple[list[tuple[int, "subprocess.Popen[bytes]"]], str]
"""Parts by number, and what is said of them."""


class Followers:
    """The processes of parts 1, 2, …; used by the engine's thread, but for `send`, which any may call."""

    def __init__(self, config: EngineConfig, model: ModelConfig, parts: tuple[Part, ...]) -> None:
        """Starts the processes."""
        self.lead_part = parts[0]
        shapes = BaseShapes(*parts[0].config.base_shapes())
        self._adapter_parts = AdapterParts(shapes, [part.slices for part in parts])
        self._config = config
        self._model = model
        self._place = MeetingPlace.make("parts")
        self._store_path = str(self._place.path / "store")
        self._lock = threading.Lock()
        self._lost = threading.Event()
        self._reason = ""
        self._is_closing = False
        self._is_alone = threading.Event()  # it waits for none of the others
        self._is_alone.set()
        self._step_began_at: float | None = None  # time.monotonic
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pulses: list[Pulse] = []
        self._has_begun = False
        self._watchers: list[threading.Thread] = []
        for index in range(1, config.tensor_parallel_size):
            self._spawn(index)
        self._hang_watch = VitalThread(self._end_hung, "follower-watch")
        if config.heartbeat_timeout_s or config.step_timeout_s:
            self._hang_watch.start()

    @classmethod
    def start(cls, config: EngineConfig, model: ModelConfig) -> "Followers":
        """They read their parts of the model while this process reads its own.

        Raises ValueError where the model cannot be split so.
        """
        parts = split_model(model, config.tensor_parallel_size)
        _check(config)
        return cls(config, model, parts)

    def _spawn(self, index: int) -> None:
        mine, theirs = socket.socketpair()
        my_lifeline, lifeline = open_lifeline()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with theirs, lifeline:
            fds = (theirs.fileno(), lifeline.fileno())
            process = subprocess.Popen(
                [sys.executable, "-m", "toppings.engine.follower_process", *map(str, fds)],
                pass_fds=fds,
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        start = Start(self._config, self._model, index, self._store_path)
        watcher = threading.Thread(target=self._watch, args=(process, index), daemon=True)
        self._connections.append(Connection(mine.detach()))
        self._processes.append(process)
        self._pulses.append(Pulse(my_lifeline))
        self._watchers.append(watcher)
        watcher.start()
        with suppress(OSError):  # its watcher notices that it ended
            self._connections[-1].send_bytes(encode(start))

    def _watch(self, process: subprocess.Popen[bytes], index: int) -> None:
        code = process.wait()
        if self._is_closing or self._lost.is_set():
            return
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        ended = f"the process of part {index} of the model (pid {process.pid}) ended with {how}"
        self._reason = self._reason or ended
        self._lost.set()
        if not self._is_alone.wait(HANG_S):
            logger.error("%s, and what waits for it does not end; the engine ends", self._reason)
            logging.shutdown()
            os._exit(1)

    def _end_hung(self) -> None:
        """Ends followers that are not waited for any longer: what waits for them then breaks off, or never
        will (see `_watch`)."""
        while not (self._is_closing or self._lost.is_set()):
            time.sleep(LOOK_S)
            hung, why = self._silent() or self._late() or ([], "")
            if not hung:
                continue
            names = ", ".join(f"{index} (pid {process.pid})" for index, process in hung)
            self._reason = f"the process of part {names} of the model {why}"
            logger.error("%s; it is ended", self._reason)
            for _, process in hung:
                process.kill()
            return

    def _silent(self) -> _Hung | None:
        """One that gives no sign of life; imports and compilers may, before all have begun."""
        timeout_s = self._config.heartbeat_timeout_s
        for index, pulse in enumerate(self._pulses, 1):
            pulse.look()
            why = pulse.why_given_up(timeout_s if self._has_begun else math.inf) if timeout_s else None
            if why is not None:
                return [(index, self._processes[index - 1])], why
        return None

    def _late(self) -> _Hung | None:
        """When a step takes too long, those that are stopped; all, where none is: they cannot be told
        apart."""
        bound_s, began_at = self._config.step_timeout_s, self._step_began_at
        if not bound_s or began_at is None or time.monotonic() - began_at < bound_s:
            return None
        numbered = list(enumerate(self._processes, 1))
        hung = [each for each in numbered if is_stopped(each[1].pid)] or numbered
        return hung, f"hangs: a step takes more than {bound_s:g} s (step_timeout_s)"

    # --- start ---

    def _await_loaded(self) -> None:
        for connection in self._connections:
            while not connection.poll(REPLY_POLL_S):
                self.check()
            try:
                reply = receive_reply(connection)
            except EOFError:
                self._lost.wait(BLAME_S)
                self.check()
                raise
            if isinstance(reply, Failed):
                raise ValueError(reply.reason)
            assert isinstance(reply, Loaded), reply

    def begin(self, num_pages: int, adapters: AdapterManager) -> None:
        """All processes become one group; the others make their caches and pools, and obey from now on.

        Raises FollowerLostError, or ValueError as a follower that has not got its part of the model.
        """
        self._await_loaded()
        with self._together():
            meet(self._config, self._store_path, 0)
        arena = adapters.host.arena
        self.send(Begin(num_pages, adapters.pool.num_slots, arena.size_bytes))
        for connection in self._connections:
            with socket.socket(fileno=os.dup(connection.fileno())) as end:
                socket.send_fds(end, [b"\0"], [arena.fd])
        self._has_begun = True

    def lead(self) -> Lead:
        return Lead(self._adapter_parts, self.send, self.take_landed)

    def leading(self, runner: ModelRunner, adapters: AdapterManager) -> "LeadRunner":
        return LeadRunner(runner, adapters, self)

    # --- while it runs ---

    def send(self, message: ToFollower) -> None:
        """To all; one that has gone is noticed elsewhere."""
        data = encode(message)
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.send_bytes(data)

    def take_landed(self) -> list[int]:
        """Ids of loads that followers have in place, each once per follower; never blocks.

        Raises FollowerLostError.
        """
        self.check()
        landed: list[int] = []
        for connection in self._connections:
            with suppress(OSError, EOFError):  # noticed elsewhere
                while connection.poll(0):
                    reply = receive_reply(connection)
                    assert isinstance(reply, Landed), reply
                    landed += reply.load_ids
        return landed

    def run(self, runner: ModelRunner, batch: Batch, slots: dict[int, int]) -> StepInFlight:
        """One step of all, until its tokens are there. Raises FollowerLostError where it breaks off or takes
        too long."""
        with self._together():
            self._step_began_at = time.monotonic()
            try:
                self.send(step_of(batch, slots))
                step = runner.start(batch)
                step.result()
                return step
            finally:
                self._step_began_at = None

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Whatever breaks off inside leaves the parts out of step. Raises FollowerLostError for it."""
        self.check()
        self._is_alone.clear()
        try:
            yield
        except Exception as error:
            self._lost.wait(BLAME_S)
            raise FollowerLostError(
                self._reason or f"the parts of the model are out of step: {error}"
            ) from error
        finally:
            self._is_alone.set()

    def check(self) -> None:
        """Raises FollowerLostError where one has ended."""
        self._hang_watch.check()
        if self._lost.is_set():
            raise FollowerLostError(self._reason)

    def close(self) -> None:
        """Ends all processes."""
        self._is_closing = True
        self.send(Stop())
        if dist.is_initialized() and not (self._lost.is_set() and self._config.device == "cuda"):
            dist.destroy_process_group()  # with followers that are alive NCCL needs their part in it
        deadline = time.monotonic() + EXIT_TIMEOUT_S
        for process, watcher in zip(self._processes, self._watchers, strict=True):
            watcher.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            watcher.join()
        if self._hang_watch.is_alive():
            self._hang_watch.join()
        for connection, pulse in zip(self._connections, self._pulses, strict=True):
            connection.close()
            pulse.close()
        self._place.close()


class LeadRunner:
    """The lead's model runner: its steps are its followers' too."""

    def __init__(self, runner: ModelRunner, adapters: AdapterManager, followers: Followers) -> None:
        self._runner = runner
        self._adapters = adapters
        self._followers = followers

    def start(self, batch: Batch, previous: StepInFlight | None = None) -> StepInFlight:
        """Raises FollowerLostError where the step breaks off."""
        assert previous is None, "the parts of a model take one step at a time"
        ids = {item.adapter_id for item in batch.items}
        slots = {a: self._adapters.slot_of(a) for a in ids if a is not None}
        return self._followers.run(self._runner, batch, slots)

    def can_run_ahead(self, requests: Sequence[Request]) -> bool:
        return False

    def forget(self, request: Request) -> None:
        self._runner.forget(request)
