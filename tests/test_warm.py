"""Children of tests that are forked are what `subprocess` would have started."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from tests.waiting import wait_until
from tests.warm import COLD, WarmPopen

VERSION = [sys.executable, "-m", "toppings", "version"]


def test_output_and_exit_codes_are_those_of_a_cold_start(tmp_path: Path) -> None:
    warm, cold = (
        subprocess.run(VERSION, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
        for env in (None, {**os.environ, COLD: "1"})
    )
    assert (warm.stdout, warm.stderr, warm.returncode) == (cold.stdout, cold.stderr, cold.returncode)
    wrong = subprocess.run([*VERSION, "--nonsense"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "--nonsense" in wrong.stderr


async def test_asyncio_starts_them_warm_too() -> None:
    """One that has loaded what only a server does."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "toppings.engine.process", str(theirs.fileno())]
    with mine, theirs:
        process = await asyncio.create_subprocess_exec(*command, pass_fds=(theirs.fileno(),))
        try:
            assert any("aiohttp" in row.path for row in psutil.Process(process.pid).memory_maps())
        finally:
            process.kill()
        assert await process.wait() == -signal.SIGKILL


def test_it_is_a_child_with_its_own_command_line_and_can_be_killed() -> None:
    assert subprocess.Popen is WarmPopen
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "toppings.engine.process", str(theirs.fileno())]
    with (
        mine,
        theirs,
        subprocess.Popen(command, pass_fds=(theirs.fileno(),)) as process,
    ):  # it waits for a start
        assert f"PPid:\t{os.getpid()}\n" in Path(f"/proc/{process.pid}/status").read_text()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_the_process_of_a_server_that_forks_engines_is_warm_too(tmp_path: Path) -> None:
    """It has loaded what of its own it never would."""
    places = ["--log-dir", str(tmp_path / "logs"), "--state-dir", str(tmp_path / "state")]
    command = [sys.executable, "-m", "toppings", "serve", "--model", "demo", "--port", "0", *places]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        server = psutil.Process(process.pid)
        forkers: list[psutil.Process] = []
        try:
            wait_until(lambda: any(child.children() for child in server.children()))
            forkers = [child for child in server.children() if "toppings.engine.process" in child.cmdline()]
            assert [forker.ppid() for forker in forkers] == [process.pid]
            assert any("aiohttp" in row.path for row in forkers[0].memory_maps())
        finally:
            process.kill()
    wait_until(lambda: not any(forker.is_running() for forker in forkers))
