"""Options that are the settings of a dataclass."""

from dataclasses import dataclass
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from toppings.config import setting
from toppings.lab.options import SettingsOf, verb


@dataclass(frozen=True)
class Fleet:
    num_servers: int = setting(3, "how many")
    rates: tuple[float, ...] = setting((1.5, 2.0), "of requests")
    pool_bytes: int = setting(2**30, "of a server")
    wait_s: float = setting(0.5, "at the most")
    kind: str = setting("big", "of what size", choices=("big", "small"))
    is_own: bool = False


@dataclass(frozen=True)
class Options:
    fleet: Annotated[dict[str, Any], SettingsOf(Fleet, without=("kind",), defaults={"num_servers": 8})]


seen: list[Options] = []
app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
@verb
def run(options: Options) -> None:
    seen.append(options)


def given(*arguments: str) -> Fleet:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Fleet(**seen[-1].fleet)


def test_without_options_the_settings_have_their_defaults_or_the_verbs_own() -> None:
    assert given() == Fleet(num_servers=8)


def test_options_are_named_without_what_units_and_numbers_say() -> None:
    fleet = given("--servers", "5", "--rates", "3,4", "--pool-bytes", "2MiB", "--wait", "0.25")
    assert fleet == Fleet(5, (3.0, 4.0), 2 * 2**20, 0.25)


@pytest.mark.parametrize("option", ["--kind", "--is-own"])
def test_settings_that_are_left_out_or_not_explained_are_no_options(option: str) -> None:
    assert CliRunner().invoke(app, [option, "1"]).exit_code == 2


def test_a_list_that_is_none_is_named() -> None:
    with pytest.raises(ValueError, match="rates are '1;2'; write numbers with commas between"):
        given("--rates", "1;2")
