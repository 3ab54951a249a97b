"""When a process that gives no sign of life is given up."""

import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from toppings.engine.heartbeat import _BEAT, BEAT_S, LOOK_S, STOPPED_S, Pulse, open_lifeline
from toppings.process_state import go_on, is_stopped

BOUND_S = 5.0


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def wait_until_stopped(pid: int) -> None:
    while not is_stopped(pid):
        time.sleep(0.001)


def pulse_of(pid: int, silent_s: float) -> Pulse:
    pulse = Pulse(open_lifeline()[0])
    pulse.pid, pulse.silent_s = pid, silent_s
    return pulse


def test_a_silent_process_that_runs_has_until_the_bound(sleeper: subprocess.Popen[bytes]) -> None:
    assert pulse_of(sleeper.pid, BOUND_S).why_given_up(BOUND_S) is None
    assert pulse_of(sleeper.pid, BOUND_S + 0.1).why_given_up(BOUND_S) == "gave no sign of life for 5 s"


def test_a_silent_process_that_is_stopped_is_given_up_soon(sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.send_signal(signal.SIGSTOP)
    wait_until_stopped(sleeper.pid)
    assert pulse_of(sleeper.pid, STOPPED_S).why_given_up(BOUND_S) is None
    reason = pulse_of(sleeper.pid, STOPPED_S + 0.1).why_given_up(BOUND_S)
    assert reason == "was stopped, by a signal or a debugger"
    go_on(sleeper.pid)
    assert pulse_of(sleeper.pid, STOPPED_S + 0.1).why_given_up(BOUND_S) is None


def test_a_process_that_has_gone_is_not_stopped(sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.kill()
    sleeper.wait()
    assert not is_stopped(sleeper.pid)
    go_on(sleeper.pid)


def test_a_beat_ends_the_silence_and_a_suspended_machine_makes_none() -> None:
    mine, theirs = open_lifeline()
    pulse = Pulse(mine)
    pulse._looked_at -= 3600.0  # nobody looked for an hour
    pulse.look()
    assert pulse.silent_s <= 2 * LOOK_S
    for value in (4711, 3):
        theirs.send(_BEAT.pack(value))
    pulse.look()
    assert (pulse.pid, pulse.silent_s, pulse.stuck_s) == (4711, 0.0, 3 * BEAT_S)
    theirs.close()
    pulse.look()
    assert pulse.has_ended
    pulse.close()
