"""Before anything imports Triton: without a GPU its kernels run in its interpreter, on the CPU."""

import os

import torch

pytest_plugins = ["pytester", "tests.gate"]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
