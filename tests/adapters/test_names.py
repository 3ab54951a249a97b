"""What adapters may be called, and which base model they say is theirs."""

import pytest

from toppings.adapters.errors import AdapterError, AdapterNameReserved
from toppings.adapters.names import check_name, is_same_base


@pytest.mark.parametrize("name", ["base", "BASE", "Base", "__base_model__", "__BASE_MODEL__"])
def test_a_name_that_means_the_base_model_is_refused(name: str) -> None:
    with pytest.raises(AdapterNameReserved, match="base model"):
        check_name(name, "base")


@pytest.mark.parametrize(
    "name",
    [
        "a/pin",
        "org/a/pin",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/.",
        "a\x85",
        "\ud800",
        "a\u00a0",
    ],
)
def test_a_name_that_would_break_routes_is_refused(name: str) -> None:
    with pytest.raises(AdapterError, match="not allowed"):
        check_name(name, "base")


@pytest.mark.parametrize("name", ["pin", "pin/a", "a.b", "base-2", "a?b", "a%2Fb", "a#b", "a\\b", "ключ"])
def test_an_odd_name_that_breaks_nothing_is_allowed(name: str) -> None:
    check_name(name, "base")


@pytest.mark.parametrize(
    ("trained_on", "is_same"),
    [
        ("", True),
        ("base", True),
        ("/elsewhere/Base/", True),
        ("org/BASE", True),
        ("/cache/models--org--base/snapshots/0123abc", True),
        ("org/other", False),
        ("/models/other", False),
        ("/cache/models--org--other/snapshots/0123abc", False),
    ],
)
def test_base_models_are_compared_by_their_last_part(trained_on: str, is_same: bool) -> None:
    assert is_same_base(trained_on, {"base", "/models/base"}) is is_same


def test_a_base_model_in_a_hub_cache_is_known_by_its_own_name() -> None:
    assert is_same_base("org/llama", {"/cache/models--org--llama/snapshots/0123abc"})
