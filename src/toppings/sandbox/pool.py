"""Some processes that take jobs from many callers, none of whom can keep the others waiting for long."""

import asyncio
import json
import queue
import signal
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from toppings.sandbox.process import ProcessEndedError, SandboxProcess

MEMORY_BYTES = 512 << 20
TURN_TIMEOUT_S = 10.0
"""The longest that a job waits for its key and for a process together."""


class SandboxError(ValueError):
    """The job failed, took too long or asked for too much; the message says which."""


class SandboxLostError(SandboxError):
    """Its process gave no answer or was ended: another time the same job may succeed."""


class SandboxBusyError(RuntimeError):
    """So many jobs were waiting that this one had no turn in time."""


class Sandbox:
    """Processes are started when needed, and end with this object or with the process that holds it.

    Any thread may call `run`; `run_in_turn` is for the tasks of one event loop. `work`: what it does for
    requests, for the message of SandboxBusyError.
    """

    def __init__(
        self, num_processes: int = 1, *, memory_bytes: int = MEMORY_BYTES, work: str = "a sandbox"
    ) -> None:
        self._work = work
        processes = [SandboxProcess(memory_bytes) for _ in range(num_processes)]
        self._idle: queue.LifoQueue[SandboxProcess] = queue.LifoQueue()
        for process in processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(num_processes, "sandbox")
        self._turns: dict[str, list[asyncio.Future[None]]] = {}  # by key, who waits behind the one that runs
        self._free = asyncio.Semaphore(num_processes)
        self._end = weakref.finalize(self, _end_all, processes, self._threads)

    def run(self, kind: str, *, cpu_s: float, **arguments: Any) -> Any:
        """The result of the job `kind` (see `child.JOBS`), which may use `cpu_s` seconds of a processor.

        Raises SandboxError.
        """
        frame = json.dumps([kind, cpu_s, arguments]).encode()
        process = self._idle.get()
        try:
            result, error = json.loads(_ask(process, frame, cpu_s))
        finally:
            self._idle.put(process)
        if error is not None:
            raise SandboxError(error)
        return result

    async def run_in_turn(self, key: str, kind: str, *, cpu_s: float, **arguments: Any) -> Any:
        """`run`, beside the event loop. Jobs of one `key` run one after another, so that a slow one keeps
        back those of its own key only, as long as there are more processes than slow keys. Where there are
        not, nobody waits longer than `TURN_TIMEOUT_S` before the job begins.

        Raises SandboxError, SandboxBusyError.
        """
        try:
            async with asyncio.timeout(TURN_TIMEOUT_S):
                await self._take_turn(key)
        except TimeoutError as error:
            raise SandboxBusyError(f"too many requests wait for {self._work}; try again soon") from error
        try:
            job = asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: self.run(kind, cpu_s=cpu_s, **arguments)
            )
        except BaseException:
            self._end_turn(key)
            raise
        job.add_done_callback(lambda _: self._end_turn(key))  # also where nobody waits for it any more
        job.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(job)

    async def _take_turn(self, key: str) -> None:
        """First the key's, then one of the processes, so that many jobs of one key hold one process."""
        await self._take_key(key)
        try:
            await self._free.acquire()
        except BaseException:
            self._pass_on(key)
            raise

    async def _take_key(self, key: str) -> None:
        if key not in self._turns:
            self._turns[key] = []
            return
        turn = asyncio.get_running_loop().create_future()
        self._turns[key].append(turn)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():  # it came as this one gave up
                self._pass_on(key)
            raise

    def _end_turn(self, key: str) -> None:
        self._free.release()
        self._pass_on(key)

    def _pass_on(self, key: str) -> None:
        waiting = self._turns[key]
        while waiting:
            if not (turn := waiting.pop(0)).done():
                turn.set_result(None)
                return
        del self._turns[key]

    def close(self) -> None:
        """Ends the processes; a second call does nothing."""
        self._end()


def _ask(process: SandboxProcess, frame: bytes, cpu_s: float) -> bytes:
    """A process that somebody else ended is no fault of the job: it is tried once more."""
    for is_last_try in (False, True):
        try:
            return process.ask(frame, cpu_s)
        except TimeoutError as error:
            raise SandboxLostError("its process gave no answer in time") from error
        except ProcessEndedError as error:
            if error.status == -signal.SIGPROF:
                raise SandboxError(f"it takes longer than {cpu_s:g} s") from error
            if is_last_try:
                raise SandboxLostError(f"its process ended with status {error.status}") from error
    raise AssertionError


def _end_all(processes: Iterable[SandboxProcess], threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.close()
