"""The environment of all tests; it has to stand before torch and Triton are imported."""

import os
import shutil

# Engines and tests share few cores: a team of threads that spins while it waits takes them from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from tests import warm

warm.install()

# A registry syncs its file some ten times, and so waits for a disk where its directory is on one.
MEMORY, ROOM_BYTES = "/dev/shm", 2 << 30
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

pytest_plugins = ["pytester", "tests.gate", "tests.order"]

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
