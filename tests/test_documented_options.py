"""The options that the documents name are there."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from typer import Context
from typer.core import TyperGroup

from toppings import command
from toppings.cluster.router.settings import RouterConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_OTHER_COMMANDS = {"--help", "--build-arg", "--shm-size"}  # Docker's
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")


def _options(command: Any) -> dict[tuple[str, ...], set[str]]:
    """Every verb with its options, those of verbs below it as well."""
    if not isinstance(command, TyperGroup):
        return {(): {name for param in command.params for name in param.opts}}
    context = Context(command)
    groups = {name: command.get_command(context, name) for name in command.list_commands(context)}
    below = {(name, *verb): opts for name, sub in groups.items() for verb, opts in _options(sub).items()}
    return {(): set().union(*below.values()), **below}


SCRIPTS = {
    option
    for folder in ("benchmarks", "examples")
    for file in (ROOT / folder).rglob("*.py")
    for option in OPTION.findall(file.read_text())
}
VERBS = _options(typer.main.get_command(command.app))


def _code(text: str) -> list[str]:
    """Lines of indented and fenced code, and inline code, each with what continues it."""
    joined = text.replace("\\\n", " ")
    indented = re.findall(r"^    (.+)$", joined, re.MULTILINE)
    fenced = [
        line for block in re.findall(r"```.*?\n(.*?)```", joined, re.DOTALL) for line in block.split("\n")
    ]
    return [*indented, *fenced, *re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", joined)]


def _missing(code: str) -> list[str]:
    """Options in a command line of `toppings` that its verb has not."""
    words = code.partition("#")[0].split()
    at = next((i for i, word in enumerate(words) if word.rpartition("/")[2] == "toppings"), None)
    if at is None:
        return []
    verb: tuple[str, ...] = ()
    for word in words[at + 1 :]:
        if (*verb, word) not in VERBS and not any(known[: len(verb) + 1] == (*verb, word) for known in VERBS):
            break
        verb = (*verb, word)
    if not verb:
        return []  # of another command, for which toppings is but a word
    known = VERBS[verb] | {"--help"}
    return [name for name in OPTION.findall(" ".join(words[at:])) if name not in known]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_in_a_documents_command_is_one_of_its_verb(document: Path) -> None:
    missing = {code: gone for code in _code(document.read_text()) if (gone := _missing(code))}
    assert missing == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_named_by_itself_is_one_of_some_verb(document: Path) -> None:
    alone = {code.split()[0] for code in _code(document.read_text()) if OPTION.match(code)}
    assert alone - VERBS[()] - SCRIPTS - OF_OTHER_COMMANDS == set()


def test_route_has_an_option_for_every_setting() -> None:
    names = {f"--{f.name.replace('_', '-')}" for f in fields(RouterConfig)}
    assert names - VERBS[("route",)] == set()


def test_the_routers_settings_are_documented_with_their_defaults() -> None:
    text = (ROOT / "docs" / "cluster.md").read_text()
    block = next(block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "policy:" in block)
    documented = {**yaml.safe_load(block), "instances": ()}
    defaults = {f.name: f.default for f in fields(RouterConfig)}
    assert documented == defaults


def test_a_check_of_documents_finds_what_is_not_there() -> None:
    assert _missing("toppings route --nonsense 3 --policy random") == ["--nonsense"]
    assert _missing(".venv/bin/toppings up --candidates 2") == ["--candidates"]
