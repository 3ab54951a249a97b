"""Policies that decide among a few candidates drawn for each request."""

from collections import Counter

import pytest

from tests.cluster.test_policies import NEW, instance
from toppings.cluster.fleet import Fleet
from toppings.cluster.policies import POLICIES, PolicySettings, make_policy
from toppings.cluster.router.settings import RouterConfig
from toppings.config import ConfigError


@pytest.mark.parametrize("name", POLICIES)
def test_choice_is_an_open_instance_of_the_whole_fleet(name: str) -> None:
    fleet = Fleet(instance(str(i), i % 3, is_open=i % 2 == 0) for i in range(40))
    policy = make_policy(name, PolicySettings(candidates=3))
    chosen = [policy.choose(NEW, fleet) for _ in range(200)]
    assert all(choice is not None and fleet.is_open[choice.row] for choice in chosen)
    assert all(choice is not None and choice.instance_id == fleet.ids[choice.row] for choice in chosen)


def test_the_best_of_k_is_chosen_as_often_as_chance_has_it() -> None:
    """Of ten servers of ascending load and two candidates, server i is best with chance (9 - i) / 45. The
    bound is six standard deviations of a binomial."""
    fleet = Fleet(instance(str(i), i) for i in range(10))
    policy, num = make_policy("least_loaded", PolicySettings(candidates=2)), 4500
    counts = Counter(choice.row for _ in range(num) if (choice := policy.choose(NEW, fleet)))
    for row in range(10):
        share = (9 - row) / 45
        assert abs(counts[row] - num * share) <= 6 * (num * share * (1 - share)) ** 0.5


def test_as_many_candidates_as_servers_are_all_of_them() -> None:
    fleet = Fleet(instance(str(i), 9 - i) for i in range(5))
    for candidates in (5, 50):
        choice = make_policy("rank_aware", PolicySettings(candidates=candidates)).choose(NEW, fleet)
        assert choice is not None
        assert choice.row == 4


def test_draws_repeat_with_their_seed() -> None:
    fleet = Fleet(instance(str(i)) for i in range(30))

    def draw(seed: int) -> list[int]:
        policy = make_policy("rank_aware", PolicySettings(candidates=2, seed=seed))
        return [choice.row for _ in range(50) if (choice := policy.choose(NEW, fleet))]

    assert draw(1) == draw(1) != draw(2)


def test_few_open_servers_among_many_are_found() -> None:
    fleet = Fleet(instance(str(i), is_open=i == 77) for i in range(100))
    for _ in range(20):
        choice = make_policy("rank_aware", PolicySettings(candidates=2)).choose(NEW, fleet)
        assert choice is not None
        assert choice.row == 77


def test_no_open_server_is_none() -> None:
    fleet = Fleet(instance(str(i), is_open=False) for i in range(9))
    assert make_policy("rank_aware", PolicySettings(candidates=2)).choose(NEW, fleet) is None


def test_migrations_are_those_of_the_policy_itself() -> None:
    fleet = Fleet([instance("busy", 2, 8), instance("idle"), instance("other", 3)])
    plain, few = make_policy("dlora"), make_policy("dlora", PolicySettings(candidates=1))
    assert few.migrates
    assert few.migrations(fleet) == plain.migrations(fleet) != []
    assert not make_policy("rank_aware", PolicySettings(candidates=1)).migrates


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="candidates is -1"):
        PolicySettings(candidates=-1)
    with pytest.raises(ConfigError, match="candidates is -1"):
        RouterConfig(candidates=-1)
