"""The threads around workers, without workers: none ends unnoticed, and none writes to what was closed."""

import logging
import os
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.waiting import PATIENCE_S, wait_until
from toppings.assist import pool as pool_module
from toppings.assist import stream_exchange
from toppings.assist.exchange import AssistStats
from toppings.assist.pool import Worker, WorkerPool
from toppings.assist.stream_exchange import Attendant


class FakeChannel:
    def __init__(self) -> None:
        self.done = 0
        self.num_requests = 1

    @property
    def has_request(self) -> bool:
        return self.done < self.num_requests

    def finish(self) -> None:
        self.done += 1

    def set_active(self, is_active: bool) -> None: ...


class UnreachableWorker:
    """One that cannot even be woken or ended."""

    pid, core, bytes = 7, 0, b""

    def __init__(self) -> None:
        self.channel = FakeChannel()

    @property
    def is_alive(self) -> bool:
        raise OSError("no such process")

    def nudge(self) -> None:
        raise OSError("bad file descriptor")


def test_a_request_is_answered_even_if_its_worker_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_exchange, "compute_next", lambda *_: None)
    worker: Any = UnreachableWorker()
    stats = AssistStats()
    attendant = Attendant([worker], torch.zeros(1), stats, deadline_s=60.0)
    attendant.start()
    wait_until(lambda: not worker.channel.has_request)
    attendant.end_after(lambda: True)
    attendant.join(PATIENCE_S)
    assert isinstance(stats.error, OSError)


def test_a_device_that_cannot_be_asked_fails_the_step() -> None:
    def is_over() -> bool:
        raise RuntimeError("CUDA error: unspecified launch failure")

    stats = AssistStats()
    attendant = Attendant([], torch.zeros(1), stats, deadline_s=1.0)
    attendant.end_after(is_over)
    attendant.start()
    attendant.join(PATIENCE_S)
    assert not attendant.is_alive()
    assert "CUDA error" in str(stats.error)


def test_a_nudge_is_over_before_its_pipe_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number might be another file's by then."""
    worker = object.__new__(Worker)
    reading, worker._nudge_fd = os.pipe()
    worker._lock, worker._is_closed = threading.Lock(), False
    fake: Any = SimpleNamespace(set_active=lambda _: None, close=lambda: None, wait=lambda _: 0)
    worker.channel = worker._process = fake
    closer = threading.Thread(target=worker.close)
    write = os.write

    def slow_write(descriptor: int, data: bytes) -> int:
        closer.start()
        closer.join(0.1)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", slow_write)
    worker.nudge()
    closer.join(PATIENCE_S)
    worker.nudge()  # does nothing now
    assert os.read(reading, 10) == b"!"
    assert os.read(reading, 10) == b""
    os.close(reading)


class DeadWorker:
    pid, core, is_lost, is_ready, is_closed = 7, 3, True, False, False

    def how_it_ended(self) -> str:
        return "ended by signal 9"

    def close(self, *, by_force: bool = False) -> None: ...


def _pool_of(worker: object) -> WorkerPool:
    pool: Any = object.__new__(WorkerPool)
    pool.settings, pool.num_restarts, pool._workers = None, 0, [worker]
    pool._restart_delay_s, pool._restart_after, pool._is_closed = 0.25, 0.0, False
    return pool  # type: ignore[no-any-return]


def test_a_worker_that_was_killed_is_named_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(pool_module, "Worker", lambda *_: "new")
    pool = _pool_of(DeadWorker())
    pool.restart_dead()
    assert "worker 7 on core 3 ended by signal 9" in caplog.text
    assert [str(worker) for worker in pool._workers] == ["new"]
    assert pool.num_restarts == 1


def test_where_no_process_is_to_be_had_the_engine_goes_on_without_the_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError("too many processes")

    monkeypatch.setattr(pool_module, "Worker", fail)
    _pool_of(DeadWorker()).restart_dead()
    assert "too many processes" in caplog.text
