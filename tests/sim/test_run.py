"""A run of decode steps can be cut at any step's end."""

import numpy as np
import pytest

from toppings.sim.run import Run


def make_run(*, varies: bool) -> Run:
    """Five steps of 10 ns from 100 on."""
    return Run(100, 5, 0, ends=np.array([10, 20, 30, 40, 50])) if varies else Run(100, 5, 10)


@pytest.mark.parametrize("varies", [False, True])
@pytest.mark.parametrize(
    ("at", "end_at"), [(100, 110), (101, 110), (110, 110), (111, 120), (139, 140), (140, 140), (141, 150)]
)
def test_a_cut_run_ends_with_the_step_under_way_or_the_one_that_ends_just_then(
    varies: bool, at: int, end_at: int
) -> None:
    run = make_run(varies=varies)
    assert run.cut(at) == (end_at < 150)
    assert run.end_at == end_at


@pytest.mark.parametrize("varies", [False, True])
def test_cutting_after_the_end_changes_nothing(varies: bool) -> None:
    run = make_run(varies=varies)
    assert not run.cut(1000)
    assert run.end_at == 150


@pytest.mark.parametrize("varies", [False, True])
def test_steps_done_by_an_instant_include_one_that_ends_just_then(varies: bool) -> None:
    run = make_run(varies=varies)
    assert [run.num_done_by(at) for at in (100, 109, 110, 149, 150, 999)] == [0, 0, 1, 4, 5, 5]
