"""A pytest plugin: no test is skipped unnoticed.

A skip fails the run unless its reason stands in `ALLOWED` and the reason's condition, which asks the machine
and not the code under test, holds here. What the development set-up installs is no reason to skip. A run ends
with one line a reason: what it left unchecked on this machine.
"""

import sys
from collections import Counter
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

NO_BF16_PRODUCTS = "this CPU does not multiply bfloat16"
OTHER_PACKING = "torch packs weights in another layout here"
ONE_GPU = "needs two GPUs"
NO_TRITON = "Triton has no build for this system"
NO_TEAM = "torch brings no OpenMP library here"


class Allowed(NamedTuple):
    """`unchecked`: what is not checked where `holds()` says that the reason to skip is true."""

    unchecked: str
    holds: Callable[[], bool]


@cache
def cpu_flags() -> frozenset[str]:
    """What Linux says that this CPU can; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def is_linux() -> bool:
    return sys.platform == "linux"


ALLOWED = {
    NO_BF16_PRODUCTS: Allowed(
        "kernels that use AVX-512 BF16", lambda: not {"avx512_bf16", "avx512bw"} <= cpu_flags()
    ),
    OTHER_PACKING: Allowed("products of few rows with packed weights", lambda: "amx_bf16" not in cpu_flags()),
    ONE_GPU: Allowed("a model split over GPUs", lambda: num_gpus() < 2),
    NO_TRITON: Allowed("Triton kernels", lambda: not is_linux()),
    NO_TEAM: Allowed("CPU kernels on several threads", lambda: not is_linux()),
}

ON_A_GPU = Allowed("Triton kernels on a GPU (they ran in Triton's interpreter)", lambda: num_gpus() > 0)


def why_not(reason: str) -> str | None:
    """Why a test may not be skipped for `reason` on this machine; None where it may."""
    allowed = ALLOWED.get(reason)
    if allowed is None:
        return f"skipped for a reason that {__name__}.ALLOWED does not list: {reason}"
    return None if allowed.holds() else f"skipped for a reason that does not hold on this machine: {reason}"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str | None:
    """Why the test or module was skipped; None where it was not (a failure that was expected is none)."""
    if not report.skipped or hasattr(report, "wasxfail") or not isinstance(report.longrepr, tuple):
        return None
    return report.longrepr[2].removeprefix("Skipped: ")


def _judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = _reason(report)
    if reason is not None and (fault := why_not(reason)) is not None:
        report.outcome, report.longrepr = "failed", fault


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _judge(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _judge(report)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [_reason(report) for report in terminalreporter.stats.get("skipped", [])]
    unchecked = Counter(f"{ALLOWED[reason].unchecked} ({reason})" for reason in reasons if reason in ALLOWED)
    if not ON_A_GPU.holds():
        passed = terminalreporter.stats.get("passed", [])
        unchecked[ON_A_GPU.unchecked] = sum("gpu" in report.keywords for report in passed)
    for what, count in sorted((+unchecked).items()):
        terminalreporter.write_line(f"not checked on this machine: {what}: {count} tests")
