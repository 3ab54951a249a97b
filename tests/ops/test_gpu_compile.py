"""The interpreter accepts what the compiler does not: each launch is compiled, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.gpu_world import needs_triton

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "compile_kernels.py"


@needs_triton
@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", ["llama-2-7b"])
def test_every_kernel_compiles_for_hopper_without_spills_and_with_wide_loads(
    model: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), "--model", model, "--capability", "90"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["spilling"] == []
    assert set(report["without_wide_loads"]) <= {"_combine_kernel"}
