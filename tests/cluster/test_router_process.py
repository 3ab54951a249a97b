"""`toppings route` as a process: started from the command line, stopped while it works, started again."""

import fcntl
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.cluster.fakes import FakeVllm, serving
from tests.waiting import PATIENCE_S, wait_until
from toppings.lab.http.server import free_port

LIMIT_S = PATIENCE_S


@contextmanager
def router(
    url: str, port: int = 0, log_dir: Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its URL once it serves."""
    options = ["--instances", url, "--port", str(port), "--policy", "rank_aware", "--slo-tpt-ms", "60"]
    options += ["--log-dir", str(log_dir)] if log_dir else ["--request-log", "0", "--audit-log", "off"]
    command = [sys.executable, "-m", "toppings", "route", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            found = (re.search(r"Router running on (\S+)", line) for line in lines)
            yield process, next(match[1] for match in found if match)
        finally:
            process.kill()


def body(num_tokens: int) -> dict[str, object]:
    return {"model": "small", "prompt": "hi", "max_tokens": num_tokens, "stream": True}


def test_restart_costs_no_stream_that_has_begun_and_the_next_one_serves(tmp_path: Path) -> None:
    server = FakeVllm()
    server.behaviour.token_s = 0.1
    with serving(server) as url:
        with (
            router(url, free_port(), tmp_path) as (process, routed),
            httpx.Client(base_url=routed, timeout=LIMIT_S) as client,
        ):
            assert client.get("/ready").status_code == 200
            with client.stream("POST", "/v1/completions", json=body(8)) as response:
                events = response.iter_lines()
                text = next(events)
                process.send_signal(signal.SIGTERM)
                text += "".join(events)
            assert text.endswith("data: [DONE]")
            assert text.count('"text"') == 8
            assert process.wait(LIMIT_S) == 0
            [line] = (tmp_path / "router" / "requests.jsonl").read_text().splitlines()
            assert json.loads(line).items() >= {"outcome": "answered", "completion_tokens": 8}.items()
        port = int(routed.rpartition(":")[2])
        with router(url, port) as (_, again):
            assert again == routed
            reply = httpx.post(f"{again}/v1/completions", json=body(2), timeout=LIMIT_S)
            assert reply.text.endswith("data: [DONE]\n\n")
    assert server.seen == ["small", "small"]


def test_killed_router_cuts_what_it_had_at_once_and_the_next_one_serves() -> None:
    """SIGKILL: each client sees its connection end, no server goes on for nobody, none waits."""
    server = FakeVllm()
    server.behaviour.token_s = 0.1
    with serving(server) as url, ThreadPoolExecutor(4) as pool:
        with router(url, free_port()) as (process, routed):
            ends = [pool.submit(_outcome, routed, body(10_000)) for _ in range(4)]
            wait_until(lambda: len(server.seen) == 4)
            process.kill()
            assert [end.result(LIMIT_S) for end in ends] == ["cut"] * 4  # a client that waits says "lost"
            wait_until(lambda: server.num_aborted == 4)
        with router(url, int(routed.rpartition(":")[2])) as (_, again):
            assert again == routed
            assert _outcome(again, body(2)) == "whole"


def test_a_router_whose_log_nobody_reads_serves_and_ends() -> None:
    """What it has to say is many times what the pipe holds."""
    server = FakeVllm()
    server.behaviour.mode = "busy"  # each attempt is a line of the log
    with (
        serving(server) as url,
        router(url) as (process, routed),
        httpx.Client(base_url=routed, timeout=LIMIT_S) as client,
    ):
        assert process.stderr is not None
        pipe_bytes = fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        for number in range(pipe_bytes // 10):
            named = {"X-Request-Id": f"{number:064}"}
            assert client.post("/v1/completions", json=body(1), headers=named).status_code == 429
        assert client.get("/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0


def _outcome(url: str, request: dict[str, object]) -> str:
    try:
        reply = httpx.post(f"{url}/v1/completions", json=request, timeout=LIMIT_S)
    except httpx.TransportError as error:
        return "lost" if isinstance(error, httpx.TimeoutException) else "cut"
    return "whole" if reply.text.endswith("data: [DONE]\n\n") else reply.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "best"], "policy is 'best'"),
        (["--instances", "nowhere"], "instance url is 'nowhere'"),
        (["--slo-tpt-ms", "0"], "slo_tpt_ms is 0"),
    ],
)
def test_bad_option_is_named(options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "toppings", "route", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
