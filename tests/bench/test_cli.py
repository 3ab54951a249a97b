import json
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from tests.bench.fake_server import Script, serving
from toppings.lab.cli import bench_app, report

app = Typer(pretty_exceptions_enable=False)
app.add_typer(bench_app, name="bench")
app.command("report")(report)


def _invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, arguments)


def _requests(url: str, *more: str) -> Result:
    return _invoke("bench", "requests", "--url", url, "--requests", "6", "--max-tokens", "3", *more)


def test_requests_prints_times_and_writes_them_as_json(tmp_path: Path) -> None:
    file = tmp_path / "out" / "result.json"
    with serving(Script()) as url:
        result = _requests(url, "--json", str(file))
    assert result.exit_code == 0, result.output
    for text in ("TTFT ms", "TPT ms", "E2E ms", "average time s", "total time s", "6, 0"):
        assert text in result.output
    content = json.loads(file.read_text())
    assert content["num_requests"] == len(content["requests"]) == 6
    assert content["machine"]["num_cores"] >= 1


def test_auto_takes_the_adapters_that_the_server_lists_and_warm_up_is_not_counted() -> None:
    script = Script()
    with serving(script) as url:
        _requests(url, "--warmup", "3")
    assert [body["model"] for body in script.bodies] == ["a", "b", "a", "b", "a", "b", "a", "b", "a"]


def test_named_adapters_are_used() -> None:
    script = Script()
    with serving(script) as url:
        _requests(url, "--adapters", "b,c", "--warmup", "0")
    assert {body["model"] for body in script.bodies} == {"b", "c"}


def test_the_key_may_stand_in_a_file(tmp_path: Path) -> None:
    script, key_file = Script(), tmp_path / "key"
    key_file.write_text("of-the-file\n")
    with serving(script) as url:
        _requests(url, "--api-key-file", str(key_file))
        _requests(url, "--api-key", "of-the-option", "--api-key-file", str(key_file))
        refused = _requests(url, "--api-key-file", str(tmp_path / "none"))
    assert set(script.keys) == {"Bearer of-the-file", "Bearer of-the-option"}
    assert "cannot read api_key_file" in str(refused.exception)


def test_a_server_without_adapters_is_an_error_that_names_the_way_out() -> None:
    with serving(Script(adapters=())) as url:
        result = _requests(url)
    assert "name models with --adapters, e.g. 'base'" in str(result.exception)


def test_failed_requests_are_told_and_make_the_exit_code_1() -> None:
    with serving(Script()) as url:
        result = _requests(url, "--adapters", "a,refused")
    assert result.exit_code == 1
    assert "3 failed: HTTP 404: no such model" in result.output


@pytest.mark.parametrize("link_gbps", [0.0, 2.5])
def test_an_emulated_link_stands_beside_the_numbers(link_gbps: float) -> None:
    with serving(Script(link_gbps=link_gbps)) as url:
        result = _requests(url)
    assert ("emulated link, 2.5 GB/s" in result.output) == bool(link_gbps)


def test_the_generate_api_sends_words() -> None:
    script = Script()
    with serving(script) as url:
        result = _requests(url, "--api", "generate", "--rps", "100")
    assert result.exit_code == 0, result.output
    assert all(len(body["inputs"].split()) == 64 for body in script.bodies)


def test_report_prints_and_writes_what_the_logs_say(tmp_path: Path) -> None:
    for mode, load_ms in (("cached", 0.0), ("on_demand", 6.0)):
        directory = tmp_path / "logs" / mode
        directory.mkdir(parents=True)
        records = [
            {"kind": "prefill", "ms": 4.0 + load_ms, "load_ms": load_ms},
            {"kind": "decode", "ms": 2, "load_ms": 0},
        ]
        (directory / "steps.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (directory / "config.yaml").write_text("link_gbps: 0.5\n")
    files = {name: tmp_path / f"report.{name}" for name in ("json", "png")}
    result = _invoke(
        "report", str(tmp_path / "logs"), "--json", str(files["json"]), "--figure", str(files["png"])
    )
    assert result.exit_code == 0, result.output
    assert "emulated link, 0.5 GB/s" in result.output
    content = json.loads(files["json"].read_text())
    assert content["emulated_link_gbps"] == [0.5]
    assert content["modes"]["on_demand"]["prefill_ms"] == 10.0
    assert files["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--json", "--figure"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    option: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    result = _invoke("bench", "modes", option, str(tmp_path / "file" / "r.png"))
    assert isinstance(result.exception, OSError)
    assert "file" in str(result.exception)


def test_a_comparison_of_no_mode_is_refused() -> None:
    assert "no mode is given" in str(_invoke("bench", "modes", "--modes", "").exception)


def test_a_figure_of_an_unknown_kind_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    result = _invoke("bench", "modes", "--figure", str(tmp_path / "figure.bmp3"))
    assert "its name must end in one of" in str(result.exception)
