"""Logs stop nobody: full disks, slow disks, files that grow."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S, wait_until
from toppings import log_files
from toppings.engine.step_log import StepLog
from toppings.log_files import QueuedHandler, RotatingFile, StandardError, log_handlers


def test_records_reach_the_file_in_order(tmp_path: Path) -> None:
    log = StepLog(str(tmp_path / "new" / "steps.jsonl"))
    for number in range(100):
        log.write({"number": number})
    log.close()
    lines = (tmp_path / "new" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == list(range(100))
    assert log.num_dropped == 0


def test_a_full_disk_drops_and_counts_records_and_says_so_once(capfd: pytest.CaptureFixture[str]) -> None:
    log = StepLog("/dev/full")
    for _ in range(50):
        log.write({"kind": "decode"})
    wait_until(lambda: log.num_dropped >= 50)
    assert capfd.readouterr().err.count("/dev/full cannot be written") == 1


def test_a_line_that_is_cut_spoils_no_other_and_all_that_are_lost_are_counted(tmp_path: Path) -> None:
    """The bound of a file's size cuts as a full disk does: what fits is written, then nothing."""
    path = tmp_path / "log"
    code = (
        "import resource, sys; from toppings.log_files import RotatingFile\n"
        "def bound(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))\n"
        "log = RotatingFile(sys.argv[1], 0)\n"
        "bound(25); log.append(b'one 56789\\ntwo 56789\\ncut 56789\\nlost 6789\\n')\n"
        "log.append(b'lost too\\n')\n"
        "bound(resource.RLIM_INFINITY); log.append(b'three\\n'); log.append(b'four\\n')\n"
        "print(log.num_dropped)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert path.read_text() == "one 56789\ntwo 56789\ncut 5\nthree\nfour\n"
    assert done.stdout == "3\n"


def test_a_line_that_a_process_before_has_left_unfinished_is_ended(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"one\nhalf")
    log = RotatingFile(tmp_path / "log", 0)
    log.append(b"two\n")
    log.close()
    log.append(b"three\n")
    assert (tmp_path / "log").read_bytes() == b"one\nhalf\ntwo\nthree\n"


def test_a_write_that_takes_a_part_at_a_time_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    log = RotatingFile(tmp_path / "log", 0)
    log.append(b"a line of many parts\n")
    monkeypatch.undo()
    assert (tmp_path / "log").read_bytes() == b"a line of many parts\n"
    assert log.num_dropped == 0


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = StepLog(str(tmp_path / "file" / "steps.jsonl"))
    log.write({})
    log.close()


def test_a_disk_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log_files, "MAX_QUEUED_LINES", 10)
    monkeypatch.setattr(log_files, "RECORDS_LINGER_S", 0.1)
    monkeypatch.setattr(RotatingFile, "append", lambda self, data: time.sleep(PATIENCE_S))
    log = StepLog(str(tmp_path / "steps.jsonl"))
    for _ in range(100):
        log.write({})
    assert log.num_dropped >= 100 - 10 - 1
    assert caplog.messages == ["steps.jsonl: 1 are dropped so far: too many wait"]  # once a minute
    log.close()


def test_a_record_that_is_no_json_is_dropped_and_the_next_is_written(tmp_path: Path) -> None:
    log = StepLog(str(tmp_path / "steps.jsonl"))
    log.write({"what": object()})
    log.write({"number": 1})
    log.close()
    assert (tmp_path / "steps.jsonl").read_text() == '{"number": 1}\n'
    assert log.num_dropped == 1


@pytest.mark.parametrize("path", ["", "off"])
def test_it_can_be_off(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = StepLog(path)
    log.write({})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_bounded_and_the_one_before_is_kept(tmp_path: Path) -> None:
    log = RotatingFile(tmp_path / "log", 1000)
    for number in range(100):
        log.append(b"%098d\n" % number)
    kept = [(tmp_path / name).read_text().split() for name in ("log.1", "log")]
    assert all(0 < len(lines) <= 11 for lines in kept)
    assert [int(line) for lines in kept for line in lines][-1] == 99
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]


def test_processes_that_share_a_file_lose_nothing_when_it_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "log"
    code = (
        "import sys; from toppings.log_files import RotatingFile;"
        "log = RotatingFile(sys.argv[1], 10_000);"
        "[log.append(b'%s %040d\\n' % (sys.argv[2].encode(), n)) for n in range(150)]"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path), name], env=environment) for name in "ab"
    ]
    assert [process.wait(PATIENCE_S) for process in processes] == [0, 0]
    lines = path.read_text().splitlines() + path.with_name("log.1").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 300


def test_neither_a_disk_that_hangs_nor_an_unread_pipe_holds_up_who_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that takes its lines says what the other has not taken."""
    monkeypatch.setattr(log_files, "MAX_QUEUED_LINES", 10)
    monkeypatch.setattr(log_files, "LINGER_S", 0.1)
    hangs, goes_on = threading.Event(), threading.Event()

    class Hanging(StandardError):
        def append(self, data: bytes) -> None:
            hangs.set()
            goes_on.wait(PATIENCE_S)

    monkeypatch.setattr(log_files, "StandardError", Hanging)
    told, kept = log_handlers(str(tmp_path / "log"), 0)
    assert isinstance(told, QueuedHandler)
    log = logging.Logger("hanging")
    for handler in (told, kept):
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        log.addHandler(handler)
    for number in range(50):
        log.warning("line %d", number)
        assert hangs.wait(PATIENCE_S)  # with the first line
        wait_until(lambda: not isinstance(kept, QueuedHandler) or not kept.queue.unfinished_tasks)
    assert told.num_dropped == 50 - 10 - 1
    started_at = time.monotonic()
    for handler in (told, kept):
        handler.close()
    assert time.monotonic() - started_at < PATIENCE_S / 2  # not as long as it hangs
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line for line in lines if "line" in line.split()] == [f"WARNING line {n}" for n in range(50)]
    assert [line for line in lines if "standard error takes no lines, 1 are dropped" in line] == [
        line for line in lines if "takes no lines" in line
    ]
    goes_on.set()


def test_the_last_words_of_a_process_and_what_failed_are_written(tmp_path: Path) -> None:
    code = (
        "import logging, os, sys; from toppings.log_files import LOG_FORMAT, log_handlers;"
        "logging.basicConfig(format=LOG_FORMAT, handlers=log_handlers(sys.argv[1], 0));\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: logging.exception('the %s words', 'last')\n"
        "logging.shutdown(); os._exit(1)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    told = subprocess.run(command, env=environment, check=False, capture_output=True, text=True).stderr
    assert (tmp_path / "log").read_text() == told
    assert "ERROR root: the last words\nTraceback" in told
    assert told.count("ZeroDivisionError") == 1


def test_a_log_handler_on_a_full_disk_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    log = logging.Logger("full")
    file = RotatingFile("/dev/full", 0)
    log.addHandler(handler := QueuedHandler(file, "full"))
    for _ in range(20):
        log.warning("hello")
    log.warning("%d", "no number")
    handler.close()
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert file.num_dropped == 20
