"""The environment of all tests, of which a part has to stand before torch and Triton are imported."""

import fcntl
import gc
import os
import shutil
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext

# Engines and tests share few cores: a team of threads that spins while it waits takes them from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from tests import warm

warm.install()

# A registry syncs its file some ten times, and so waits for a disk where its directory is on one.
MEMORY, ROOM_BYTES = "/dev/shm", 2 << 30
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)


@contextmanager
def behind_the_first() -> Iterator[None]:
    """Of several processes one collects alone; what it compiles, the others, who then come together, read."""
    with open(__file__) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(file, fcntl.LOCK_SH)
            fcntl.flock(file, fcntl.LOCK_UN)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """What is imported and collected is no garbage: nobody looks for any, then or in a test."""
    does_wait = hasattr(session.config, "workerinput") and not sys.dont_write_bytecode
    gc.disable()
    try:
        with behind_the_first() if does_wait else nullcontext():
            make_examples_the_same()
            return (yield)
    finally:
        gc.freeze()
        gc.enable()


def make_examples_the_same() -> None:
    """Hypothesis's, in every run, however long a busy machine takes over one: what fails, fails again."""
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow]
    settings.register_profile("gate", deadline=None, derandomize=True, suppress_health_check=slow)
    settings.load_profile("gate")


pytest_plugins = ["pytester", "tests.gate", "tests.order"]

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
