"""When an adapter is folded and when taken out again, on a clock of the test's own."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from toppings.engine.fold_policy import FoldCosts, FoldPolicy

COSTS = FoldCosts(pass_s=0.002, row_s=0.0001, switch_s=1.0)
STEP_S = 0.02
MAIN, OTHER, THIRD = 1, 2, 3


@dataclass
class Load:
    """Steps one after another; `switches` at what instant the target became what."""

    policy: FoldPolicy = field(default_factory=lambda: FoldPolicy(30.0))
    costs: FoldCosts = COSTS
    now: float = 1000.0
    saved_s: float = 0.0  # by being folded, less what switching took
    switches: list[tuple[float, int | None]] = field(default_factory=list)

    def step(self, rows: dict[int | None, int], step_s: float = STEP_S) -> None:
        policy = self.policy
        before = policy.target
        if before is not None:
            num_own = rows.get(before, 0)
            self.saved_s += self.costs.saved_s(num_own, sum(rows.values()) - num_own)
        self.now += step_s
        policy.note_step(rows, step_s, self.now)
        if before is None and policy.candidate not in (None, policy.priced):
            assert policy.candidate is not None
            policy.price(policy.candidate, self.costs)
        if policy.target != before:
            self.switches.append((self.now, policy.target))
            self.saved_s -= self.costs.switch_s / 2

    def run(self, steps: Iterator[dict[int | None, int]] | list[dict[int | None, int]]) -> None:
        for rows in steps:
            self.step(rows)


def mixed(main_in: int, num_steps: int, num_rows: int = 8) -> list[dict[int | None, int]]:
    """One of `main_in` rows is another's."""
    rows = [MAIN if (i + 1) % main_in else OTHER for i in range(num_steps * num_rows)]
    steps: list[dict[int | None, int]] = []
    for i in range(num_steps):
        own = rows[i * num_rows : (i + 1) * num_rows]
        steps.append({each: own.count(each) for each in dict.fromkeys(own)})
    return steps


def test_an_adapter_with_nearly_all_of_the_work_is_folded_once_that_has_paid() -> None:
    load = Load()
    load.run(mixed(20, 10_000))
    [(at, target)] = load.switches
    assert target == MAIN
    assert at - 1000 > COSTS.switch_s / (COSTS.pass_s + 8 * COSTS.row_s) * STEP_S  # not before it could pay
    assert load.saved_s > 5
    assert load.policy.share_of(MAIN) == pytest.approx(0.95, abs=0.01)
    assert 0 < load.policy.gain < 0.14


def test_half_the_work_is_not_enough_however_long_it_lasts() -> None:
    load = Load()
    load.run(mixed(2, 10_000))
    assert load.switches == []


@pytest.mark.parametrize("period_s", [0.1, 1.0, 5.0])
def test_adapters_that_take_turns_quickly_cause_no_switch(period_s: float) -> None:
    load = Load()
    for i in range(10_000):
        who = MAIN if int(load.now / period_s) % 2 else OTHER
        load.step({who: 8} if i % 7 else {who: 5, None: 3})
    assert load.switches == []


@pytest.mark.parametrize("period_s", [10.0, 20.0, 40.0, 100.0, 1000.0])
def test_however_they_take_turns_switching_costs_little_beside_what_it_saves(period_s: float) -> None:
    """What is lost by deciding late is at most what a switch costs, for each turn that causes one."""
    load, could_save, num_turns = Load(), 0.0, 4 if period_s == 1000 else 30
    while load.now < 1000 + num_turns * period_s:
        load.step({MAIN if int(load.now / period_s) % 2 else OTHER: 8})
        could_save += load.costs.saved_s(8, 0)
    assert load.saved_s > -0.05 * could_save, load.switches
    assert len(load.switches) <= 2 * num_turns
    if period_s == 1000:
        assert load.saved_s > 0.9 * could_save


def test_a_folded_adapter_that_nobody_asks_for_stays_until_others_have_lost_by_it() -> None:
    load = Load()
    load.run(mixed(20, 5_000))
    assert load.policy.target == MAIN
    load.now += 3600
    assert load.policy.target == MAIN
    load.run([{OTHER: 1}] * 10)
    assert load.policy.target == MAIN
    load.run([{OTHER: 1}] * 2000)
    assert [target for _, target in load.switches[:2]] == [MAIN, None]


def test_what_wins_next_to_nothing_is_left_alone() -> None:
    load = Load(costs=FoldCosts(0.00001, 0.0, 0.01))
    load.run(mixed(20, 10_000))
    assert load.switches == []


def test_the_base_model_and_thousands_of_adapters_are_never_candidates() -> None:
    policy = FoldPolicy(30.0)
    for i in range(5000):
        policy.note_step({None: 9, i: 1}, STEP_S, float(i))
        assert policy.candidate is None
    assert policy.share_of(None) == pytest.approx(0.9)


def test_years_on_shares_are_still_numbers() -> None:
    policy = FoldPolicy(0.5)
    for i in range(2000):
        policy.note_step({MAIN: 3, 10 + i: 1}, STEP_S, i * 100.0)
    policy.note_step({MAIN: 1}, STEP_S, 1e9)
    assert policy.share_of(MAIN) == 1
    assert policy.candidate == MAIN
