"""Who may write to a state directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from toppings.adapters.errors import StateError, StateHeldError
from toppings.adapters.state_lock import StateLock


def test_a_second_one_is_told_which_directory_and_who_holds_it(tmp_path: Path) -> None:
    lock = StateLock.take(tmp_path / "state", "toppings serve")
    with pytest.raises(StateHeldError) as refused:
        StateLock.take(tmp_path / "state", "LLM")
    for told in (str(tmp_path / "state"), f"process {os.getpid()} (toppings serve)", "--state-dir"):
        assert told in str(refused.value)
    lock.close()
    StateLock.take(tmp_path / "state", "LLM").close()


def test_those_that_share_it_keep_a_single_owner_out(tmp_path: Path) -> None:
    shared = [StateLock.take(tmp_path, "toppings up", is_shared=True) for _ in range(2)]
    with pytest.raises(StateHeldError):
        StateLock.take(tmp_path, "toppings serve")
    for lock in shared:
        lock.close()
    owner = StateLock.take(tmp_path, "toppings serve")
    with pytest.raises(StateHeldError):
        StateLock.take(tmp_path, "toppings up", is_shared=True)
    owner.close()


def test_a_killed_process_leaves_the_directory_free(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from toppings.adapters.state_lock import StateLock\n"
        "lock = StateLock.take(Path(sys.argv[1]), 'x'); print('held', flush=True); sys.stdin.read()"
    )
    args = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StateHeldError, match=str(holder.pid)):
            StateLock.take(tmp_path, "y")
        holder.kill()
        holder.wait()
    StateLock.take(tmp_path, "y").close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"file/state.*--state-dir"):
        StateLock.take(tmp_path / "file" / "state", "x")
