"""Outputs that are held to a structure, over the built-in model: valid, whoever else is in the batch."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from tests.engine.driver import Driver, drive
from tests.engine.graph_fakes import FakeGraphs
from toppings.core import FinishReason
from toppings.demo import demo_adapters_dir, demo_model_dir
from toppings.engine.base import model_config
from toppings.sampling_params import Structure, StructureKind
from toppings.text import TextModel

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from structured.schemas import random_schema

NUM_SCHEMAS = 60
MAX_TOKENS = 500
ADAPTERS = {name: demo_adapters_dir() / name for name in ("json", "pirate")}
NAMES = (None, *ADAPTERS)
SETTINGS: dict[str, Any] = {"max_num_seqs": 24, "max_model_len": 600, "num_threads": 2, "page_size": 16}
STREET = '{"type": "object", "properties": {"street": {"type": "string", "maxLength": 9}, "number": {"type":'
ADDRESS = f'{STREET} "integer", "minimum": 1, "maximum": 99}}}}, "required": ["street", "number"]}}'
ADDRESS = ADDRESS.replace('"required"', '"additionalProperties": false, "required"')


@pytest.fixture(scope="module")
def text() -> TextModel:
    return TextModel.load(demo_model_dir())


@pytest.fixture(scope="module")
def prompt(text: TextModel) -> list[int]:
    return text.encode("Describe a ship as JSON:\n")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    settings = {**SETTINGS, "kv_cache_bytes": 64 << 20}
    with drive(demo_model_dir(), tmp_path_factory.mktemp("state"), ADAPTERS, **settings) as driver:
        yield driver


def structured(kind: str, text: str = "", **more: Any) -> dict[str, Any]:
    structure = Structure(StructureKind(kind), text)
    return {"structure": structure, "ignore_eos": False, "temperature": 1.0, **more}


def test_outputs_are_what_their_schemas_accept(driver: Driver, prompt: list[int], text: TextModel) -> None:
    """In one batch with free text, of base and adapters; the validator is another library."""
    for seed in range(NUM_SCHEMAS):
        wish = structured("json_schema", json.dumps(random_schema(seed)), seed=seed)
        driver.add(f"schema {seed}", prompt, MAX_TOKENS, NAMES[seed % 3], **wish)
        if seed % 10 == 0:
            driver.add(f"free {seed}", prompt, 50, NAMES[seed % 3], temperature=1.0, seed=seed)
    tokens = driver.run()
    for seed in range(NUM_SCHEMAS):
        name = f"schema {seed}"
        assert driver.last[name].finish_reason is FinishReason.STOP, text.decode(tokens[name])
        checker = Draft202012Validator(random_schema(seed), format_checker=FormatChecker())
        checker.validate(json.loads(text.decode(tokens[name])))


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", "[A-C]{2,4}(-[0-9]{1,3})?", "[A-C]{2,4}(-[0-9]{1,3})?"),
        ("choice", '["north", "south by south-west", "ünï"]', "north|south by south-west|ünï"),
        ("grammar", 'start: word ("," word){2}\nword: /[a-z]{1,5}/', "[a-z]{1,5}(,[a-z]{1,5}){2}"),
        ("grammar", 'start: "<" %json {"enum": [1, 2]} ">"', "<[12]>"),
    ],
)
def test_outputs_match_as_a_whole(
    driver: Driver, prompt: list[int], text: TextModel, kind: str, source: str, pattern: str
) -> None:
    names = [f"{kind} {source} {seed}" for seed in range(6)]
    for seed, name in enumerate(names):
        wish = structured(kind, source, seed=seed, logprobs=2, repetition_penalty=1.1)
        driver.add(name, prompt, 60, NAMES[seed % 3], **wish)
    driver.run()
    for name in names:
        assert driver.last[name].finish_reason is FinishReason.STOP
        assert driver.first[name].logprobs is not None
        assert re.fullmatch(pattern, text.decode(driver.tokens[name]))


def test_any_object_is_json(driver: Driver, prompt: list[int], text: TextModel) -> None:
    """The output of this one may be cut, so that it is what begins an object that is told."""
    driver.add("object", prompt, 80, "json", **structured("json_object", temperature=0.0))
    output = text.decode(driver.run()["object"])
    assert output.startswith("{")
    if driver.last["object"].finish_reason is FinishReason.STOP:
        assert isinstance(json.loads(output), dict)


def test_the_end_of_a_complete_output_comes_before_min_tokens(driver: Driver, prompt: list[int]) -> None:
    driver.add("early", prompt, 60, **structured("choice", '["yes"]', min_tokens=50))
    tokens = driver.run()["early"]
    assert len(tokens) < 10
    assert driver.last["early"].finish_reason is FinishReason.STOP


def test_min_tokens_holds_where_more_may_follow(driver: Driver, prompt: list[int]) -> None:
    driver.add("late", prompt, 60, **structured("regex", "(ab)+", min_tokens=12, temperature=0.0))
    assert len(driver.run()["late"]) >= 12


def test_stop_tokens_and_the_limit_end_an_output(driver: Driver, prompt: list[int], text: TextModel) -> None:
    [brace] = text.encode("{", add_special_tokens=False)
    driver.add("stopped", prompt, 60, **structured("regex", "[{]{9}", stop_token_ids=(brace,), top_k=1))
    driver.add("cut", prompt, 3, **structured("json_schema", ADDRESS))
    driver.run()
    assert driver.last["stopped"].stop_token_id == brace
    assert driver.last["cut"].finish_reason is FinishReason.LENGTH


def test_a_bad_structure_that_slips_through_ends_its_own_request_alone(
    driver: Driver, prompt: list[int], text: TextModel
) -> None:
    driver.add("free", prompt, 20, temperature=0.0)
    expected = list(driver.run()["free"])
    driver.add("bad", prompt, 20, **structured("regex", "[a"))
    driver.add("too much", prompt, 20, **structured("grammar", 'start: "a" start'))
    driver.add("free again", prompt, 20, temperature=0.0)
    driver.add("good", prompt, 60, **structured("choice", '["yes", "no"]'))
    driver.run()
    assert "unclosed character class" in (driver.last["bad"].error or "")
    assert "any further" in (driver.last["too much"].error or "")
    assert driver.tokens["free again"] == expected
    assert text.decode(driver.tokens["good"]) in ("yes", "no")


def test_a_request_may_leave_while_its_structure_is_compiled(driver: Driver, prompt: list[int]) -> None:
    words = [f"{i} {i * 7919 % 10007}" for i in range(3000)]
    driver.add("gone", prompt, 20, **structured("choice", json.dumps(words)))
    driver.engine.check_integrity()
    driver.engine.abort("gone")
    driver.engine.check_integrity()
    assert not driver.engine.has_requests
    driver.add("stays", prompt, 40, **structured("choice", json.dumps(words)))
    driver.run()
    assert driver.last["stays"].finish_reason is FinishReason.STOP


def run_mixed(driver: Driver, prompt: list[int]) -> dict[str, list[int]]:
    """Structured and free requests of all kinds, more than may run at once."""
    for i in range(8):
        wish = structured("json_schema", ADDRESS, seed=i, temperature=(0.0, 1.0)[i % 2])
        driver.add(f"address {i}", prompt[: 2 + i], 80, NAMES[i % 3], **wish)
        wish = structured("regex", "[A-F]{9,12}!", seed=i, min_tokens=4)
        driver.add(f"code {i}", prompt[: 3 + i], 80, **wish)
        driver.add(f"free {i}", prompt[: 1 + i], 25, NAMES[i % 3], seed=i, temperature=1.0)
        driver.add(f"penalised {i}", prompt[: 2 + i], 25, frequency_penalty=0.5, presence_penalty=0.4)
        driver.step()
    return dict(driver.run())


def test_tokens_of_steps_that_run_ahead_are_those_of_steps_in_turn(tmp_path: Path, prompt: list[int]) -> None:
    """Also after preemptions, and with decode steps captured."""
    settings: dict[str, Any] = {**SETTINGS, "page_size": 4, "max_model_len": 120, "kv_cache_bytes": 64 << 20}
    with drive(demo_model_dir(), tmp_path / "turn", ADAPTERS, **settings, async_scheduling="off") as driver:
        expected = run_mixed(driver, prompt)
    ends = {driver.last[name].finish_reason for name in expected if name.startswith(("address", "code"))}
    assert ends == {FinishReason.STOP}
    model = model_config(driver.config)
    settings |= {"async_scheduling": "on", "graphs": FakeGraphs()}
    settings["kv_cache_bytes"] = 60 * 2 * model.num_layers * model.kv_size * 4 * settings["page_size"]
    with drive(demo_model_dir(), tmp_path / "ahead", ADAPTERS, **settings) as driver:
        assert run_mixed(driver, prompt) == expected
        assert driver.engine.stats(0).counters["preemptions"]
