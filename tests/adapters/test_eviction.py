import pytest

from toppings.adapters.eviction import (
    POLICIES,
    RELOAD_OVERHEAD_BYTES,
    EvictionPolicy,
    LruPolicy,
    ValuePolicy,
    least_valuable,
    make_policy,
)

MIB = 1 << 20


def touch_all(policy: EvictionPolicy, keys: list[int], num_bytes: int = MIB) -> None:
    for key in keys:
        policy.touch(key, num_bytes)


def test_lru_lets_the_one_leave_that_was_used_longest_ago() -> None:
    policy = LruPolicy()
    touch_all(policy, [1, 2, 3, 1])
    assert least_valuable(policy, [1, 2, 3]) == [2, 3, 1]


def test_value_keeps_what_is_used_often() -> None:
    policy = ValuePolicy()
    touch_all(policy, [1, 1, 1, 2, 3])
    assert least_valuable(policy, [1, 2, 3])[-1] == 1


def test_value_keeps_what_costs_more_per_byte_to_bring_back() -> None:
    policy = ValuePolicy()
    policy.touch(1, 64 * MIB)
    policy.touch(2, MIB)
    assert least_valuable(policy, [1, 2]) == [1, 2]
    assert policy.worth(2) == 1 + RELOAD_OVERHEAD_BYTES / MIB


def test_value_of_old_popularity_fades_as_others_are_evicted() -> None:
    policy = ValuePolicy()
    touch_all(policy, [1] * 5)
    for key in range(2, 20):
        policy.touch(key, MIB)
        victim = least_valuable(policy, [1, key])[0]
        if victim == 1:
            return
        policy.forget(victim, was_evicted=True)
    pytest.fail("an adapter that is never used again stayed for ever")


def test_removal_by_the_owner_ages_nobody() -> None:
    policy = ValuePolicy()
    touch_all(policy, [1] * 5)
    policy.forget(1, was_evicted=False)
    policy.touch(2, MIB)
    assert policy.worth(2) == 1 + RELOAD_OVERHEAD_BYTES / MIB


@pytest.mark.parametrize("name", POLICIES)
def test_forgotten_key_starts_anew(name: str) -> None:
    policy = make_policy(name)
    touch_all(policy, [1, 2])
    policy.forget(1, was_evicted=True)
    assert policy.worth(1) == 0


def test_unknown_policy_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="'fifo' is unknown; choose one of value, lru"):
        make_policy("fifo")
