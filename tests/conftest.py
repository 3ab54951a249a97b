"""The environment of all tests; it has to stand before torch and Triton are imported."""

import os

# Engines and tests share few cores: a team of threads that spins while it waits takes them from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from tests import warm

warm.install()

pytest_plugins = ["pytester", "tests.gate"]

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
