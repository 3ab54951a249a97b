"""`toppings doctor`: what it finds, and that it tells a mistake for what it is."""

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from toppings.adapters.state_lock import StateLock
from toppings.command import app
from toppings.control_groups import memory_available
from toppings.doctor import machine

Doctor = Callable[..., tuple[int, str]]


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    def run(*options: str) -> tuple[int, str]:
        rest = ("--model", "demo", "--port", "0", "--state-dir", str(tmp_path / "state"))
        small = ("--host-store-bytes", "1MB", "--device-pool-bytes", "1MB", "--kv-cache-bytes", "1MB")
        given = [*rest, *small, "--log-dir", str(tmp_path), *options]
        result = CliRunner().invoke(app, ["doctor", *given], env={"COLUMNS": "200"})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result.exit_code, result.output

    return run


def test_a_machine_that_serves_is_told_so(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: 2**36)
    code, output = doctor()
    assert (code, "WRONG" in output) == (0, False), output
    assert "toppings-demo" in output
    assert f"{len(os.sched_getaffinity(0))} for this process" in output
    assert not (tmp_path / "state").exists()  # it changes nothing


def test_every_mistake_is_told_with_what_to_change(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: 2**30)
    (tmp_path / "tenants.yaml").write_text("tenants: [nonsense]")
    (tmp_path / "state").mkdir()
    lock = StateLock.take(tmp_path / "state", "another server")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, output = doctor(
            *("--port", str(taken.getsockname()[1]), "--num-threads", "100000"),
            *("--tenants-file", str(tmp_path / "tenants.yaml"), "--host-store-bytes", "64GiB"),
            *("--device", "cuda", "--otlp-traces-endpoint", "nonsense"),
        )
    lock.close()
    assert code == 1
    wrong = {line.split()[1] for line in output.splitlines() if line.startswith("WRONG")}
    assert wrong >= {"threads", "memory", "state", "port", "keys", "traces"}, output
    assert f"process {os.getpid()} (another server)" in output
    assert output.count("->") >= len(wrong)


def test_adapters_that_a_server_would_not_find(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "gone").symlink_to(tmp_path / "nothing")
    code, output = doctor("--adapters", str(tmp_path / "adapters"))
    assert "is a link to nothing" in output
    places = ("--adapters", "/no/such", "--adapter-roots", "/no/root", "--adapter-source", "foo:bar")
    code, output = doctor(*places)
    assert code == 1
    assert all(word in output for word in ("/no/such", "there is no directory /no/root", "foo:bar")), output


def test_a_model_that_is_not_there(doctor: Doctor, tmp_path: Path) -> None:
    code, output = doctor("--model", str(tmp_path / "nowhere"))
    assert code == 1
    assert "WRONG  model" in output


def test_an_open_address_without_a_key_is_noted(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_available", lambda: 2**36)
    code, output = doctor("--host", "0.0.0.0")
    assert code == 0
    assert "note   keys" in output


V2, V1 = "0::/pod/own\n", "5:cpu,cpuacct:/\n4:memory:/pod/own\n0::/\n"


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        (V2, {}, 1000),
        (V2, {"pod/own/memory.max": "max", "pod/own/memory.current": "900"}, 1000),
        (V2, {"pod/own/memory.max": "500", "pod/own/memory.current": "200"}, 300),
        (V2, {"pod/memory.max": "400", "pod/memory.current": "300", "pod/own/memory.max": "max"}, 100),
        (
            V2,
            {
                **{"pod/own/memory.max": "500", "pod/own/memory.current": "450"},
                "pod/own/memory.stat": "anon 50\ninactive_file 300\nactive_file 100\n",
            },
            350,
        ),
        (V2, {"memory.max": "100", "memory.current": "150"}, 0),
        (
            V1,
            {
                "memory/pod/own/memory.limit_in_bytes": "500",
                "memory/pod/own/memory.usage_in_bytes": "450",
                "memory/pod/own/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n",
            },
            250,
        ),
        (
            V1,
            {"memory/memory.limit_in_bytes": "9223372036854771712", "memory/memory.usage_in_bytes": "7"},
            1000,
        ),
        (V1, {"memory/memory.limit_in_bytes": "90", "memory/memory.usage_in_bytes": "7"}, 83),
    ],
)
def test_memory_is_what_every_control_group_leaves(
    group: str, files: dict[str, str], expected: int, tmp_path: Path
) -> None:
    """In KiB; numbers of the table are made into bytes."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 5000 kB\nMemAvailable:    1000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(group)
    for name, text in files.items():
        file = tmp_path / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(re.sub(r"\b\d{1,9}\b", lambda found: str(int(found[0]) * 1024), text) + "\n")
    assert memory_available(tmp_path) == expected * 1024
