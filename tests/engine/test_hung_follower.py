"""A part of a split model that hangs ends the engine, which says which part it was."""

import os
import signal
from pathlib import Path

import pytest

from tests.engine.driver import drive
from tests.engine.oracle import make_model, make_prompt
from tests.engine.test_split_model import followers_of, is_alive
from toppings.engine.faults import FollowerLostError

STOPPED = r"the process of part 1 \(pid {}\) of the model was stopped"
LATE = r"the process of part 1 \(pid {}\) of the model hangs: a step takes more than 4 s"


@pytest.mark.parametrize(
    ("bounds", "problem"),
    [
        ({"heartbeat_timeout_s": 300.0, "step_timeout_s": 300.0}, STOPPED),
        ({"heartbeat_timeout_s": 0.0, "step_timeout_s": 4.0}, LATE),
    ],
    ids=["as the kernel says", "in a step"],
)
def test_a_follower_that_hangs_is_ended_and_named(
    tmp_path: Path, bounds: dict[str, float], problem: str
) -> None:
    model = make_model(tmp_path / "model")
    settings = {"tensor_parallel_size": 2, "mode": "pipelined", **bounds}
    with drive(model, tmp_path / "state", {}, **settings) as driver:
        driver.add("before", make_prompt(0, 9), 4)
        driver.run()
        (follower,) = followers_of(os.getpid())
        os.kill(follower, signal.SIGSTOP)
        driver.add("after", make_prompt(0, 9), 4)
        with pytest.raises(FollowerLostError, match=problem.format(follower)):
            driver.step()
    assert not is_alive(follower)
