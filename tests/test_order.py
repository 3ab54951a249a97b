"""In which order modules are run."""

from pathlib import Path

import pytest

from tests import order

ROOT = Path(__file__).parents[1]


def test_the_longest_modules_exist_and_are_named_once() -> None:
    assert [name for name in order.LONGEST if not (ROOT / name).is_file()] == []
    assert len({*order.LONGEST}) == len(order.LONGEST)


def test_they_come_first_and_all_else_stays_as_it_was(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("test_a", "test_b", "test_c", "test_d")
    pytester.makepyfile(**dict.fromkeys(names, "def test_1(): ...\ndef test_2(): ..."))
    monkeypatch.setattr(order, "LONGEST", ("test_d.py", "test_b.py"))
    options = ("-p", "tests.order", "-p", "no:asyncio", "-p", "no:unraisableexception", "--verbose")
    result = pytester.runpytest_inprocess("--assert=plain", *options)
    run = [line.split()[0] for line in result.outlines if "PASSED" in line]
    places = [
        f"{name}.py::test_{number}" for name in ("test_d", "test_b", "test_a", "test_c") for number in (1, 2)
    ]
    assert run == places
