import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import toppings
from tests.sources.hub_server import running_hub
from toppings import command
from toppings.config import MODES, Config
from toppings.core import MODULES
from toppings.synth import PRESETS, AdapterShape, write_adapters

ROOT = Path(__file__).parents[1]


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """The exit code of `toppings ARGS`."""
    monkeypatch.setattr(sys, "argv", ["toppings", *args])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "vocab_size": 512,
        "max_position_embeddings": 128,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Configurations that `serve` would have run with."""
    configs: list[Config] = []

    def run_server(config: Config, _: object) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr("toppings.server.lifecycle.run_server", run_server)
    return configs


def test_version_is_printed() -> None:
    assert CliRunner().invoke(command.app, ["version"]).output == f"toppings {toppings.__version__}\n"


def test_help_needs_no_torch() -> None:
    modules = sorted({module for module, _ in command.VERBS.values() if module.startswith(command.CLI)})
    assert len(modules) > 1
    code = (
        f"import sys, {', '.join(modules)}; print({{'torch', 'transformers', 'fastapi'}} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_serve_has_an_option_for_every_setting() -> None:
    shown = CliRunner().invoke(command.app, ["serve", "--help"], env={"COLUMNS": "300"}).output
    missing = [n for n in Config().to_settings() if f"--{n.replace('_', '-')}" not in shown]
    assert missing == []


def test_options_override_the_file(
    served: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("mode: cached\nmax-queue: 7\n")
    roots = ["--adapter-roots", "/a", "--adapter-roots", "/b"]
    assert run(monkeypatch, "serve", "--config", str(file), "--mode", "on_demand", *roots) == 0
    [config] = served
    assert (config.engine.mode, config.server.max_queue) == ("on_demand", 7)
    assert config.server.adapter_roots == ("/a", "/b")


def test_sizes_may_have_units(served: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "serve", "--device-pool-bytes", "3MiB")
    assert served[0].engine.device_pool_bytes == 3 * 2**20


def test_made_adapters_may_target_all_projections(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, args = tmp_path / "made", ("--count", "1", "--targets", "all")
    assert run(monkeypatch, "synth", "adapters", str(path), "--model", str(model), *args) == 0
    made = json.loads((path / "adapter-00000" / "adapter_config.json").read_text())
    assert set(made["target_modules"]) == set(MODULES)


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_has_a_configuration_file(mode: str) -> None:
    assert Config.from_yaml(ROOT / "configs" / f"{mode}.yaml").engine.mode == mode


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["serve", "--mode", "psychic"], "'psychic'; choose one of cached"),
        (["serve", "--max-queue", "many"], "max_queue is 'many'"),
        (["serve", "--config", "/no/such.yaml"], "/no/such.yaml"),
        (["serve", "--model", "/no/such/model", "--log-dir", "{tmp}", "--port", "0"], "/no/such/model"),
        (["adapters", "check", "/no/such", "--model", "{model}"], "/no/such"),
        (["adapters", "list", "--model", "/no/model"], "/no/model"),
        (["adapters", "remove", "x", "--model", "{model}", "--state-dir", "{tmp}/s"], "'x'"),
        (["adapters", "list", "--url", "localhost"], "http://"),
        (["adapters", "list", "--url", "http://127.0.0.1:9"], "cannot reach"),
        (["synth", "model", "{tmp}/m", "--preset", "huge"], "'huge'"),
        (["synth", "model", "{tmp}/m", "--vocab", "5"], "vocab is 5"),
        (["synth", "model", "{model}"], "is there already"),
        (["synth", "adapters", "{tmp}/a", "--model", "/no/model"], "/no/model"),
        (["synth", "adapters", "{tmp}/a", "--model", "{model}", "--ranks", "x"], "ranks are 'x'"),
        (["synth", "adapters", "{tmp}/a", "--model", "{model}", "--targets", "z"], "'z'"),
        (["plan", "--rank", "513", "--tokens", "8", "--state-dir", "{tmp}/s"], "rank is 513"),
        (["plan", "--rank", "8"], "give --rank and --tokens"),
        (["plan", "--rank", "8", "fleet"], "options of `toppings plan fleet` stand behind that name"),
        (["plan", "fleet", "--synth", "busy", "--slo-tpt-ms", "40"], "unknown workload 'busy'"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    args: list[str], named: str, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    filled = [arg.format(tmp=tmp_path, model=model) for arg in args]
    assert run(monkeypatch, *filled) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert named in last


def test_adapters_are_made_checked_added_listed_and_removed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, where = tmp_path / "adapters", ["--model", str(model), "--state-dir", str(tmp_path / "state")]
    assert run(monkeypatch, "synth", "adapters", str(made), "--model", str(model), "--count", "3") == 0
    assert run(monkeypatch, "adapters", "check", str(made / "adapter-00002"), "--model", str(model)) == 0
    assert "fits: rank 32, targets q_proj, k_proj, v_proj" in capsys.readouterr().out
    assert run(monkeypatch, "adapters", "add", "one", str(made / "adapter-00000"), *where) == 0
    run(monkeypatch, "adapters", "list", *where)
    listed = capsys.readouterr().out
    [row] = [line for line in listed.splitlines() if " one " in line]
    assert str(made / "adapter-00000") in row
    assert run(monkeypatch, "adapters", "remove", "one", *where) == 0
    capsys.readouterr()
    run(monkeypatch, "adapters", "list", *where)
    assert capsys.readouterr().out == (
        "none is registered; a server registers those of --adapters when it starts\n"
    )


def test_adapters_are_merged(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made, where = tmp_path / "adapters", ["--model", str(model), "--state-dir", str(tmp_path / "state")]
    write_adapters(made, model, AdapterShape(ranks=(4,)), count=2)
    for number, name in enumerate(("one", "two")):
        assert run(monkeypatch, "adapters", "add", name, str(made / f"adapter-0000{number}"), *where) == 0
    assert run(monkeypatch, "adapters", "merge", "mix", "one=0.7", "two", *where) == 0
    assert "registered mix: rank 8" in capfd.readouterr().out
    run(monkeypatch, "adapters", "list", *where)
    assert "merge:cat: 0.7*one + 1*two" in capfd.readouterr().out
    for parts, told in (
        (["one=much"], "'one=much' is no adapter with its weight"),
        (["one", "three"], "no adapter is named 'three'"),
        (["one", "--method", "ties"], "needs a density"),
    ):
        assert run(monkeypatch, "adapters", "merge", "no", *parts, *where) == 2
        assert told in capfd.readouterr().err


def test_adapters_of_a_directory_that_a_server_holds_are_the_servers_to_change(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from toppings.adapters.state_lock import StateLock

    made, where = tmp_path / "adapters", ["--model", str(model), "--state-dir", str(tmp_path / "state")]
    write_adapters(made, model, AdapterShape(ranks=(4,)), count=1)
    assert run(monkeypatch, "adapters", "add", "one", str(made / "adapter-00000"), *where) == 0
    lock = StateLock.take(tmp_path / "state", "toppings serve")
    for verb in (["add", "two", str(made / "adapter-00000")], ["remove", "one"]):
        capfd.readouterr()
        assert run(monkeypatch, "adapters", *verb, *where) == 2
        told = capfd.readouterr().err
        assert "(toppings serve); tell it by --url what to change" in told
        assert len(told.strip().splitlines()) == 1
    run(monkeypatch, "adapters", "list", *where)
    assert "one" in capfd.readouterr().out
    lock.close()


def test_an_adapter_named_like_the_base_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made, where = tmp_path / "adapters", ["--model", str(model), "--state-dir", str(tmp_path / "state")]
    write_adapters(made, model, AdapterShape(ranks=(4,)), count=1)
    assert run(monkeypatch, "adapters", "add", "MODEL", str(made / "adapter-00000"), *where) == 2
    assert "'MODEL' is not allowed: it means the base model" in capfd.readouterr().err


def test_a_source_that_is_none_is_told_before_an_engine_starts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def spawn(*_: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("toppings.engine.spawn.Spawner.spawn", spawn)
    options = ["--model", str(model), "--log-dir", str(tmp_path / "logs"), "--port", "0"]
    for source, reason in (
        ("dir:/no/such", "no directory at /no/such"),
        ("ftp://x/y", "is none; one begins"),
    ):
        assert run(monkeypatch, "serve", "--adapter-source", source, *options) == 2
        assert reason in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("damage", ["held", "garbage", "no directory"])
def test_a_server_whose_state_cannot_be_used_says_so_before_it_starts_an_engine(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    from toppings.adapters.state_lock import StateLock

    def spawn(*_: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("toppings.engine.spawn.Spawner.spawn", spawn)
    state, lock = tmp_path / "state", None
    if damage == "held":
        lock = StateLock.take(state, "another server")
    elif damage == "garbage":
        state.mkdir()
        (state / "registry.sqlite").write_bytes(b"garbage " * 1000)
    else:
        state.touch()
    options = ["--log-dir", str(tmp_path / "logs"), "--port", "0", "--state-dir", str(state)]
    assert run(monkeypatch, "serve", "--model", str(model), *options) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert str(state) in last
    if lock is not None:
        lock.close()


def test_synthetic_adapters_repeat_with_their_seed(model: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_adapters(tmp_path / name, model, AdapterShape(ranks=(4,)), count=1, seed=seed)
    weights = [
        (tmp_path / n / "adapter-00000" / "adapter_model.safetensors").read_bytes() for n in ("a", "b", "c")
    ]
    assert weights[0] == weights[1] != weights[2]


def test_a_synthetic_model_has_the_shape_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    assert run(monkeypatch, "synth", "model", str(path), "--family", "qwen3", "--layers", "1") == 0
    config = json.loads((path / "config.json").read_text())
    assert (config["architectures"], config["num_hidden_layers"]) == (["Qwen3ForCausalLM"], 1)
    assert config["hidden_size"] == PRESETS["tiny"].hidden
    assert len(json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]) == PRESETS["tiny"].vocab


def test_an_adapter_is_pulled_from_its_place(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapters(tmp_path / "web" / "team", model, AdapterShape(ranks=(4,)), count=1)
    options = ["--model", str(model), "--state-dir", str(tmp_path / "state")]
    with running_hub(tmp_path / "web") as web:
        place = f"{web.url}/team/adapter-00000/resolve/main"
        assert run(monkeypatch, "adapters", "pull", "mine", place, *options) == 0
        assert (
            run(monkeypatch, "adapters", "pull", "other", f"{web.url}/team/none/resolve/main", *options) == 2
        )
    told = capsys.readouterr()
    assert "registered mine: rank 4, " in told.out
    assert "nothing is at" in told.err
    assert run(monkeypatch, "adapters", "pull", "mine", "no-place", *options) == 2
    assert "'no-place' is no place of an adapter" in capsys.readouterr().err
    run(monkeypatch, "adapters", "list", *options)
    assert "mine" in capsys.readouterr().out
