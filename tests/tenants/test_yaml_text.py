"""YAML event by event, against PyYAML's own loader."""

import sys
from types import FrameType
from typing import Any

import pytest
import yaml

from toppings.tenants.file import parse
from toppings.tenants.yaml_text import load_yaml

GOOD = [
    "",
    "# nothing\n",
    "---\n",
    "a",
    "[]",
    "{a: 1, b: -2.5, c: on, d: ~, e: 'on', f: \"1\", g: 0x1f, h: 1_000, i: .inf, j: 2026-01-31, k: !!str 5}",
    "a:\n  - x\n  - {y: [z, 1]}\nb: |\n  two\n  lines\nc: >-\n  folded\n  text\n",
    "base: &base {use: [a], weight: 2}\none: {<<: *base, weight: 3}\ntwo: *base\n",
    "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc:\n  <<: [*a, *b]\n  z: 5\n",
    "'<<': text\n2: two\ntrue: yes\nnull: none\n? plain\n: value\n",
    "s: &s [1, 2]\nt: [*s, *s]\n",
    "é: ünï\n",
    "a: !!int '5'\nb: !!float 1\nc: !!map {}\nd: !!seq []\n",
]
BAD = [
    *("{a: 1, a: 2}", "- {b: {c: 1, c: 2}}", "{1: a, 1: b}", "{true: a, yes: b}"),
    *("*nowhere", "a: [", "a: b: c", "--- a\n--- b\n", "\x00", "{[a]: b}", "? {a: b}\n: c"),
    *("!!python/object/apply:os.system [true]", "!own {a: 1}", "a: !own x", "a: {<<: 5}", "a: !!int x"),
    "[" * 100_000,
]


@pytest.mark.parametrize("text", GOOD)
def test_it_reads_what_pyyaml_reads(text: str) -> None:
    loaded = load_yaml(text)
    assert loaded == yaml.safe_load(text)
    assert type(loaded) is type(yaml.safe_load(text))


@pytest.mark.parametrize("text", BAD)
def test_it_refuses_what_nobody_means(text: str) -> None:
    with pytest.raises((yaml.YAMLError, ValueError, RecursionError)):
        load_yaml(text)


def test_what_is_shared_is_not_copied_and_may_hold_itself() -> None:
    laughs = "a0: &a0 [ha, ha]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    loaded = load_yaml(laughs)
    assert loaded["a59"][0] is loaded["a59"][1] is loaded["a58"]
    itself = load_yaml("&a [x, *a]")
    assert itself[1] is itself


def text_of(num_tenants: int) -> str:
    tenants = "".join(f"  team-{i}: {{use: ['team-{i}-*'], weight: 2}}\n" for i in range(num_tenants))
    keys = "".join(
        f'- {{"id": "{i:08x}", "tenant": "team-{i}", "sha256": "{i:064x}"}}\n' for i in range(num_tenants)
    )
    return f"tenants:\n{tenants}keys:\n{keys}"


def test_twice_as_many_tenants_are_twice_the_work() -> None:
    def calls(num_tenants: int) -> int:
        text, count = text_of(num_tenants), 0

        def note(frame: FrameType, event: str, arg: Any) -> None:
            nonlocal count
            count += 1

        sys.setprofile(note)
        try:
            file = parse(text, "x")
        finally:
            sys.setprofile(None)
        assert len(file.tenants) == len(file.keys) == num_tenants
        return count

    calls(10)
    few, many = calls(200), calls(400)
    assert many < 2.1 * few
