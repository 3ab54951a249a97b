from toppings.adapters.latest import Latest


def test_the_oldest_entry_is_forgotten_first() -> None:
    latest: Latest[int, str] = Latest(2)
    for key in (1, 2, 1, 3):
        latest[key] = f"as of {key}"
    assert list(latest.items()) == [(1, "as of 1"), (3, "as of 3")]
