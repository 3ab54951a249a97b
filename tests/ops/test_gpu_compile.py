"""The interpreter accepts what the compiler does not: each launch is compiled, without a GPU.

Triton keeps what it has compiled, by source, target and version: only a change is compiled again.
"""

import json
import subprocess
import sys
from pathlib import Path

from tests.ops.gpu_world import needs_triton

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "compile_kernels.py"


CHIPS = {80, 86, 89, 90, 120}
WITH_TWO_BUFFERS = {80, 90}
FIRST_WITH_EARLY_LAUNCH = 90


@needs_triton
def test_kernels_compile_for_every_chip_without_spills_and_within_its_shared_memory() -> None:
    command = [sys.executable, str(SCRIPT), "--matrix"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert {kernel["capability"] for kernel in report["kernels"]} == CHIPS
    assert (report["spilling"], report["over_shared"]) == ([], [])
    narrow = {name.split()[-1] for name in report["without_wide_loads"] if "bfloat16" in name}
    assert narrow <= {"combine_kernel"}
    attention = [k for k in report["kernels"] if k["kernel"] in ("prefill_kernel", "decode_kernel")]
    launches = {
        (k["kernel"], k["capability"] >= FIRST_WITH_EARLY_LAUNCH): k["launch"] for k in report["kernels"]
    }
    early = {name for (name, _), launch in launches.items() if launch == "early"}
    assert early == {"_expand_kernel", "_expand_rows_kernel", "combine_kernel"}
    assert all(launches[name, True] == "early" for name in early)
    ahead_of = {name for (name, _), launch in launches.items() if launch == "ahead"}
    assert ahead_of == {"_shrink_kernel", "_shrink_rows_kernel", "decode_kernel"}
    assert {launch for (_, is_late), launch in launches.items() if not is_late} == {"plain"}
    ahead = [k["num_buffers"] for k in attention if k["capability"] in WITH_TWO_BUFFERS]
    assert len(ahead) == 4
    assert min(ahead) >= 2, "keys and values are not loaded while products run"
