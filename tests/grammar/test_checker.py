"""Structures are tried before an engine gets them: what is wrong, impossible or too much is refused."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from structured.refused import REFUSED, Refused
from structured.schemas import random_schema

from toppings.bad_input import RequestError
from toppings.grammar import checker
from toppings.grammar.checker import MAX_KEPT, StructureChecker
from toppings.sampling_params import Structure, StructureKind
from toppings.sandbox import SandboxBusyError, SandboxLostError, pool
from toppings.sandbox.grammars import GBNF_RULE

VOCAB_SIZE = 1000


@pytest.fixture(scope="module")
def tried() -> Iterator[StructureChecker]:
    made = StructureChecker(["<tool>", "<|end|>"], VOCAB_SIZE)
    yield made
    made.close()


def test_there_are_many_kinds_of_what_is_refused() -> None:
    assert len(REFUSED) >= 60


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
async def test_what_cannot_be_followed_is_refused_with_the_reason(
    tried: StructureChecker, refused: Refused
) -> None:
    with pytest.raises(RequestError) as caught:
        await tried.checked(Structure(StructureKind(refused.kind), refused.text))
    assert refused.word in str(caught.value)
    assert refused.kind in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


async def test_others_are_checked_while_one_is_too_much(tried: StructureChecker) -> None:
    """The one takes a second of a processor; the loop turns, and the other process answers."""
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(4000)}}
    slow = asyncio.create_task(tried.checked(Structure(StructureKind.JSON_SCHEMA, json.dumps(schema))))
    await asyncio.sleep(0)
    quick = Structure(StructureKind.REGEX, "[a-f]+ while the other is tried")
    assert await tried.checked(quick) == quick
    assert not slow.done()
    with pytest.raises(RequestError, match=r"longer than 1 s|no answer in time"):
        await slow


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_object", ""),
        ("json_schema", "true"),
        ("json_schema", '{"x-guidance": {"lenient": true}, "not": {"type": "null"}}'),
        ("regex", "(ab|c)*d{2,3}"),
        ("choice", '["yes", "no", "q\\"uote", "new\\nline", "ü\U0001f600"]'),
        ("grammar", 'start: "a" part+\npart: /[0-9]{1,3}/ | "::="'),
        ("grammar", 'start: <tool> %json {"type": "integer"} <|end|>'),
        ("grammar", "start: <[5]> <[0,7-999]> <[^00999]> <[*]>"),
        ("grammar", 'start: "<[1000]>" /"<[1000]>/ // "<[1000]>\n# <[1000]>\n'),
    ],
)
async def test_what_can_be_followed_is_handed_on(tried: StructureChecker, kind: str, text: str) -> None:
    checked = await tried.checked(Structure(StructureKind(kind), text))
    assert checked == Structure(StructureKind(kind), "{}" if text == "true" else text)


async def test_gbnf_becomes_lark(tried: StructureChecker) -> None:
    checked = await tried.checked(Structure(StructureKind.GRAMMAR, 'root ::= "a" num\nnum ::= [0-9]+'))
    assert GBNF_RULE.search(checked.text) is None
    assert await tried.checked(checked) == checked


async def test_what_a_schema_asks_for_in_vain_is_left_out(tried: StructureChecker) -> None:
    text = (
        '{"type": "object", "properties": {"format": {"type": "string", "format": "password"}, "uniqueItems":'
        ' {"type": "array", "uniqueItems": false, "maxItems": 2.0}}, "default": {"uniqueItems": false}}'
    )
    checked = await tried.checked(Structure(StructureKind.JSON_SCHEMA, text))
    assert checked.text == (
        '{"type": "object", "properties": {"format": {"type": "string"}, "uniqueItems": {"type": "array",'
        ' "maxItems": 2}}, "default": {"uniqueItems": false}}'
    )


async def test_random_schemas_are_accepted(tried: StructureChecker) -> None:
    for seed in range(50):
        structure = Structure(StructureKind.JSON_SCHEMA, json.dumps(random_schema(seed)))
        await tried.checked(structure)


async def test_what_was_checked_is_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker, "MAX_KEPT_CHARS", 50)
    made = StructureChecker([], VOCAB_SIZE)
    names = [Structure(StructureKind.REGEX, f"{i:020}") for i in range(3)]
    for name in names:
        await made.checked(name)
    made._sandbox.close()  # what is kept needs no process
    assert len(made._kept) == 2 <= MAX_KEPT
    assert await made.checked(names[2]) == names[2]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ("1000", "token id 1000; the vocabulary has ids 0 to 999"),
        ("5,7-1000", "token id 1000;"),
        ("^1000", "token id 1000;"),
        ("9" * 5000, "token id 9999999999...;"),
        ("7-5", "token ids 7 to 5;"),
        ("7-", "cannot parse"),
    ],
)
async def test_ids_that_the_vocabulary_has_not_are_refused(
    tried: StructureChecker, ids: str, reason: str
) -> None:
    grammar = f'start: <[5]> "\\"" /\\// <[{ids}]>'
    with pytest.raises(RequestError, match="the grammar cannot be followed") as caught:
        await tried.checked(Structure(StructureKind.GRAMMAR, grammar))
    assert reason in str(caught.value)


async def test_a_refusal_is_kept_too() -> None:
    made = StructureChecker([], VOCAB_SIZE)
    wrong = Structure(StructureKind.REGEX, "[a")
    with pytest.raises(RequestError, match="unclosed character class") as first:
        await made.checked(wrong)
    made._sandbox.close()  # what is kept needs no process
    with pytest.raises(RequestError) as second:
        await made.checked(wrong)
    assert str(first.value) == str(second.value)


async def test_a_refusal_that_is_no_fault_of_the_structure_is_not_kept(
    tried: StructureChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(*args: object, **arguments: object) -> str:
        raise SandboxLostError("its process ended with status -9")

    structure = Structure(StructureKind.REGEX, "[a-f]+ whose process is killed")
    with monkeypatch.context() as patch:
        patch.setattr(tried._sandbox, "run_in_turn", lost)
        with pytest.raises(RequestError, match="status -9"):
            await tried.checked(structure)
    assert await tried.checked(structure) == structure


async def test_a_structure_that_has_no_turn_is_told_what_waits(
    tried: StructureChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "TURN_TIMEOUT_S", 0.0)
    await tried._sandbox._free.acquire()
    await tried._sandbox._free.acquire()
    try:
        with pytest.raises(SandboxBusyError, match="too many requests wait for the check of a structured"):
            await tried.checked(Structure(StructureKind.REGEX, "[a-f]+ that has no turn"))
    finally:
        tried._sandbox._free.release()
        tried._sandbox._free.release()


async def test_a_refusal_names_no_place_of_this_machine(tried: StructureChecker) -> None:
    with pytest.raises(RequestError) as caught:
        await tried.checked(Structure(StructureKind.GRAMMAR, "start: %import x"))
    assert str(Path(__file__).parents[2]) not in str(caught.value)
