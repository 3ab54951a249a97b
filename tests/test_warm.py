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
from tests.warm import COLD, SCRIPTS, WARM, WarmPopen

ROOT = Path(__file__).parents[1]
VERSION = [sys.executable, "-m", "toppings", "version"]
CODE = """
import subprocess, sys
print("torch" in sys.modules, sys.argv, __name__, sorted(name for name in globals() if name[0] != "_"))
command = [sys.executable, "-m", "toppings.engine.process", "0"]
for _ in "ab":
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        print(child.pid, flush=True)
        sys.stdin.readline()
        child.kill()
raise SystemExit("the end")
"""


def test_output_and_exit_codes_are_those_of_a_cold_start(tmp_path: Path) -> None:
    warm, cold = (
        subprocess.run(VERSION, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
        for env in (None, {**os.environ, COLD: "1"})
    )
    assert (warm.stdout, warm.stderr, warm.returncode) == (cold.stdout, cold.stderr, cold.returncode)
    wrong = subprocess.run([*VERSION, "--nonsense"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "--nonsense" in wrong.stderr


def test_code_is_warm_where_its_environment_says_so_with_as_much_of_what_it_starts() -> None:
    for more, are_warm in (({}, [False, False]), ({WARM: "1"}, [True, False])):
        with subprocess.Popen(
            [sys.executable, "-c", CODE, "x", "-c"],
            env={**os.environ, **more},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said == f"{bool(more)} ['-c', 'x', '-c'] __main__ ['subprocess', 'sys']\n"
            found = []
            for _ in are_warm:
                maps = Path(f"/proc/{int(process.stdout.readline())}/maps")
                found.append("aiohttp" in maps.read_text())
                process.stdin.write("\n")
                process.stdin.flush()
            assert process.communicate() == ("", "the end\n")
        assert (process.returncode, found) == (1, are_warm)


def test_code_that_needs_other_instructions_than_these_is_started_as_ever() -> None:
    environment = {**os.environ, WARM: "0", "NUMBA_CPU_NAME": "x86-64-v3"}
    code = "import sys; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment) == "False\n"


def test_scripts_that_are_warm_are_there() -> None:
    assert all((ROOT / name).is_file() for name in SCRIPTS)


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
