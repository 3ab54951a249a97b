"""`toppings up` as shipped: one engine, a second by demand, real clients, a killed engine, an orderly end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.waiting import PATIENCE_S, wait_until
from toppings.cluster.ray_serve.network import LOOPBACK_VARIABLE, is_loopback
from toppings.synth import PRESETS, AdapterShape, write_adapters, write_model

START_LIMIT_S = 180.0
LIMIT_S = PATIENCE_S
RAY_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled"}
SOON = {"RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR": "0.02"}
"""Replicas look at their statistics every 0.6 s instead of 6."""
SETTINGS = {
    "replicas": 1,
    "max_replicas": 2,
    "scale_by": "demand",
    "upscale_delay_s": 0,
    "downscale_delay_s": 3600,
    "slo_tpt_ms": 35,
    "port": 0,
    "num_threads": 1,
    "max_model_len": 1024,
    "kv_cache_bytes": "8MiB",
    "device_pool_bytes": "4MiB",
    "host_store_bytes": "8MiB",
    "policy": "rank_aware",
    "placement": "adaptive",
    "placement_interval_s": 0.2,
    "stats_period_s": 0.2,
    "shutdown_timeout_s": 2,
    "scheduling_policy": "priority",
}
KEY = "the-administrators"
TENANTS = f"""\
tenants:
  team: {{use: [adapter-00000], min_priority: -1}}
  trial: {{base_model: on, requests_per_minute: 2}}
keys:
  - {{id: "1", tenant: team, sha256: {sha256(b"the-teams").hexdigest()}}}
  - {{id: "2", tenant: trial, sha256: {sha256(b"the-trials").hexdigest()}}}
"""


class Up:
    """A running `toppings up`, and a client of it."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        self.num_engines_before_demand = 0
        self.http = self.client_of(KEY)

    def client_of(self, key: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, timeout=LIMIT_S, headers=headers)

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, model: str = "base", prompt: str = "hello", max_tokens: int = 8) -> str:
        reply = self.post("/v1/completions", model=model, prompt=prompt, max_tokens=max_tokens, temperature=0)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])

    def replicas(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.http.get("/replicas").json()["replicas"]
        return rows

    def running(self) -> list[int]:
        return sorted(row["num_running"] for row in self.replicas())

    def engines(self) -> list[psutil.Process]:
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [process for process in family if "toppings.engine.process" in _command(process)]


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _replicas_of(up: Up) -> list[psutil.Process]:
    family = psutil.Process(up.process.pid).children(recursive=True)
    return [process for process in family if "ServeReplica:toppings:Engine" in " ".join(_command(process))]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("up")
    write_model(path / "base", PRESETS["tiny"])
    write_adapters(path / "adapters", path / "base", AdapterShape(ranks=(4, 16)), count=2)
    write_adapters(path / "more", path / "base", AdapterShape(ranks=(8,)), count=2, seed=1)
    write_adapters(path / "sourced" / "team", path / "base", AdapterShape(ranks=(8,)), count=1, seed=2)
    return path


@pytest.fixture(scope="module")
def up(home: Path) -> Iterator[Up]:
    places = {
        "model": home / "base",
        "adapters": home / "adapters",
        "adapter_roots": [str(home / "more")],
        "adapter_source": [f"dir:{os.path.relpath(home / 'sourced')}"],
        "state_dir": home / "state",
        "log_dir": home / "logs",
        "tenants_file": home / "tenants.yaml",
    }
    (home / "tenants.yaml").write_text(TENANTS)
    settings = {**SETTINGS, **{k: v if isinstance(v, list) else str(v) for k, v in places.items()}}
    (home / "up.json").write_text(json.dumps(settings))  # JSON is YAML
    ray_dir = tempfile.mkdtemp(prefix="ray-")  # sockets in it need a short path
    process = subprocess.Popen(
        [sys.executable, "-m", "toppings", "up", "--config", str(home / "up.json")],
        stdout=subprocess.PIPE,
        stderr=(home / "stderr.log").open("w"),
        text=True,
        env={**os.environ, **RAY_ENVIRONMENT, **SOON, "RAY_TMPDIR": ray_dir, "TOPPINGS_API_KEY": KEY},
    )
    try:
        started = Up(process, _url(process, home))
        started.num_engines_before_demand = len(started.engines())
        ask_for_a_second_engine(started)
        yield started
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(LIMIT_S)
        shutil.rmtree(ray_dir, ignore_errors=True)


def _url(process: subprocess.Popen[str], home: Path) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"Toppings running on (\S+) with 1 engines", line):
            return found[1]
    pytest.fail(f"it ended while it started: {(home / 'stderr.log').read_text()[-3000:]}")


def ask_for_a_second_engine(up: Up) -> None:
    """By requests that one engine could not all serve within the objective, by the step times assumed."""
    with ThreadPoolExecutor(16) as pool:
        while len(up.replicas()) < 2:
            list(pool.map(lambda _: up.complete("adapter-00001", max_tokens=100), range(16)))


def test_engines_are_as_many_as_the_demand_needs(up: Up) -> None:
    """One when nobody asked for anything; the second one came by demand alone, and the limit is two."""
    assert (up.num_engines_before_demand, len(up.engines())) == (1, 2)


def test_openai_clients_are_served_whole_and_streamed(up: Up) -> None:
    client = openai.OpenAI(base_url=f"{up.url}/v1", api_key=KEY, max_retries=0)
    names = [model.id for model in client.models.list()]
    assert names == ["base", "adapter-00000", "adapter-00001"]
    for name in names:
        options: Any = {"model": name, "prompt": "hello", "max_tokens": 8, "temperature": 0}
        whole = client.completions.create(**options)
        stream = client.completions.create(**options, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 8
    messages: Any = [{"role": "user", "content": "hi"}]
    chat = client.chat.completions.create(model="adapter-00000", messages=messages, max_tokens=4)
    assert chat.choices[0].message.content


def test_none_of_its_processes_listens_for_other_machines(up: Up) -> None:
    family = [psutil.Process(up.process.pid), *psutil.Process(up.process.pid).children(recursive=True)]
    told = [c.laddr for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert len(told) > 5
    assert [address for address in told if not is_loopback(address.ip)] == []


def test_none_of_its_processes_comes_after_others_on_the_machine(up: Up) -> None:
    nice = psutil.Process(up.process.pid).nice()
    assert [each.nice() for each in (*_replicas_of(up), *up.engines())] == [nice] * 4


def test_one_request_of_many_sequences_is_spread_and_whole(up: Up) -> None:
    reply = up.post(
        "/v1/completions", prompt=["one", "two", "three"], n=2, max_tokens=6, temperature=0, model="base"
    ).json()
    assert [choice["index"] for choice in reply["choices"]] == list(range(6))
    assert reply["usage"]["completion_tokens"] == 36


def test_both_engines_work_and_give_the_same(up: Up) -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: up.complete("adapter-00000", max_tokens=40), range(8)))
        assert len(set(texts)) == 1
        answers = keep_both_busy(up, pool, lambda _: up.complete("base", max_tokens=900))
        assert len({answer.result() for answer in answers}) == 1
    wait_until(lambda: up.running() == [0, 0])


def keep_both_busy(
    up: Up, pool: ThreadPoolExecutor, ask: Callable[[int], str], num: int = 4
) -> "list[Future[str]]":
    """`num` requests, and as many again where they have ended before both engines were seen to work."""
    asked: list[Future[str]] = []

    def are_busy() -> bool:
        if all(answer.done() for answer in asked):
            asked.extend(pool.submit(ask, i) for i in range(num))
        return min(up.running()) > 0

    wait_until(are_busy)
    return asked


def test_adapters_loaded_and_unloaded_at_run_time_reach_both_engines(up: Up) -> None:
    load = {"lora_name": "new", "lora_path": "adapter-00001"}
    reply = up.post("/v1/load_lora_adapter", **load)
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert up.post("/v1/load_lora_adapter", **load).status_code == 400
    assert up.post("/adapters/new/pin").json() == {"name": "new", "is_pinned": True}
    wait_until(lambda: all("new" in row["adapters_on_device"] for row in up.replicas()))
    assert up.complete("new") != up.complete("base")
    reply = up.post("/v1/unload_lora_adapter", lora_name="new")
    assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert up.post("/v1/completions", model="new", prompt="hello").status_code == 404
    assert not any("new" in row["adapters_on_device"] for row in up.replicas())


def test_an_adapter_comes_from_a_source_when_a_request_names_it(up: Up) -> None:
    name = "team/adapter-00000"
    with ThreadPoolExecutor(8) as pool:
        texts = {*pool.map(lambda _: up.complete(name, max_tokens=40), range(8))}
    assert len(texts) == 1
    assert texts != {up.complete("base", max_tokens=40)}
    assert up.post("/v1/completions", model="team/none", prompt="hello").status_code == 404
    assert up.post("/v1/unload_lora_adapter", lora_name=name).status_code == 200
    assert {up.complete(name, max_tokens=40)} == texts  # fetched again


def test_an_adapter_is_read_ahead_where_it_has_a_home(up: Up) -> None:
    """Requests come one at a time, and would not need a second engine."""

    def num_holders() -> int:
        return sum("later" in row["adapters_on_host"] for row in up.replicas())

    assert up.post("/v1/load_lora_adapter", lora_name="later", lora_path="adapter-00000").status_code == 200
    assert num_holders() == 0
    for _ in range(8):
        up.complete("later")
    wait_until(lambda: num_holders() == 2)


def test_statistics_are_of_all_engines(up: Up) -> None:
    stats = up.http.get("/stats").json()
    assert stats["kv_pages_total"] == sum(row["kv_pages_total"] for row in up.replicas())
    assert stats["counters"]["generation_tokens"] > 0
    assert "vllm:num_requests_running 0.0" in up.http.get("/metrics").text
    states = {row["name"]: row["state"] for row in up.http.get("/adapters").json()["adapters"]}
    assert states["adapter-00000"] == "device"


def test_tenants_have_their_rights_and_limits_and_logs(up: Up, home: Path) -> None:
    body = {"prompt": "hello", "max_tokens": 2}
    for key in ("", "wrong"):
        with up.client_of(key) as nobody:
            assert nobody.post("/v1/completions", json={**body, "model": "base"}).status_code == 401
    with up.client_of("the-teams") as team:
        assert [each["id"] for each in team.get("/v1/models").json()["data"]] == ["base", "adapter-00000"]
        served = {**body, "model": "adapter-00000", "priority": -1}
        reply = team.post("/v1/completions", json=served, headers={"X-Request-Id": "the-teams-own"})
        assert (reply.status_code, reply.headers["X-Request-Id"]) == (200, "the-teams-own")
        assert team.post("/v1/completions", json={**body, "model": "adapter-00001"}).status_code == 404
        assert team.get("/stats").status_code == 403
        assert team.post("/v1/unload_lora_adapter", json={"lora_name": "adapter-00000"}).status_code == 403
    with up.client_of("the-trials") as trial:
        replies = [trial.post("/v1/completions", json={**body, "model": "base"}) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert replies[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert up.complete("adapter-00001")
    assert up.post("/adapters/adapter-00001/prefetch").status_code == 202
    logs = home / "logs" / "auto"
    wait_until(lambda: '"trial"' in (logs / "requests.jsonl").read_text())
    wait_until(lambda: '"prefetch"' in (logs / "audit.jsonl").read_text())
    requests = [json.loads(line) for line in (logs / "requests.jsonl").read_text().splitlines()]
    [teams] = [line for line in requests if line["request_id"] == "the-teams-own"]
    assert (teams["tenant"], teams["key"], teams["adapter"]) == ("team", "1", "adapter-00000")
    assert teams["completion_tokens"] == 2
    assert {(line["tenant"], line["status"]) for line in requests} >= {(None, 401), ("trial", 200)}
    audits = [json.loads(line) for line in (logs / "audit.jsonl").read_text().splitlines()]
    told = {(line["action"], line["tenant"], line["outcome"]) for line in audits}
    assert told >= {("prefetch", "", "done"), ("POST /v1/unload_lora_adapter", "team", "denied")}


def test_a_client_that_leaves_ends_its_request(up: Up) -> None:
    body = {"model": "base", "prompt": "hello", "max_tokens": 1000, "stream": True, "ignore_eos": True}
    with up.http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        assert "error" not in next(lines)
        assert sum(up.running()) == 1
    wait_until(lambda: up.running() == [0, 0])


@contextmanager
def engine_killer(up: Up) -> Iterator[Callable[[], object]]:
    yield up.engines()[0].kill


@contextmanager
def replica_killer(up: Up) -> Iterator[Callable[[], object]]:
    yield _replicas_of(up)[0].kill


KILL_ACTOR = """
import sys, ray
ray.init(address=sys.argv[1], namespace="serve", log_to_driver=False)
name = next(each for each in ray.util.list_named_actors() if "Engine" in each)
print("ready", flush=True)
sys.stdin.readline()
ray.kill(ray.get_actor(name))
"""


@contextmanager
def actor_killer(up: Up) -> Iterator[Callable[[], object]]:
    """`ray.kill`, by a program that has connected to the cluster beforehand."""
    family = psutil.Process(up.process.pid).children(recursive=True)
    words = (word for process in family for word in _command(process))
    address = next(word for word in words if word.startswith("--gcs-address=")).partition("=")[2]
    command = [sys.executable, "-c", KILL_ACTOR, address]
    environment = {**os.environ, **RAY_ENVIRONMENT, LOOPBACK_VARIABLE: "0"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        yield lambda: program.communicate("now\n", LIMIT_S)


@pytest.mark.parametrize("killer", [engine_killer, replica_killer, actor_killer])
def test_a_killed_replica_costs_its_requests_one_error_and_others_nothing(
    up: Up, killer: Callable[[Up], AbstractContextManager[Callable[[], object]]]
) -> None:
    """By its engine, its process or its actor: those with a token are told, those without are answered by
    the other one; a new one comes up.
    """

    def stream(number: int) -> str:
        body = {"model": "base", "prompt": f"{number}", "max_tokens": 700, "stream": True, "ignore_eos": True}
        reply = up.post("/v1/completions", **body)
        events = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
        assert events[-1] == "[DONE]", reply.text[-300:]
        error = json.loads(events[-2]).get("error")
        return "whole" if error is None else str(error["message"])

    with killer(up) as kill, ThreadPoolExecutor(12) as pool:
        started = keep_both_busy(up, pool, stream)
        kill()
        late = [pool.submit(stream, i) for i in range(4, 12)]
        ends = [answer.result(LIMIT_S) for answer in started]
        assert [answer.result(LIMIT_S) for answer in late] == ["whole"] * 8
    errors = [end for end in ends if end != "whole"]
    assert errors
    assert len(errors) < len(ends)
    assert all("after the first token; the answer is incomplete" in error for error in errors)
    wait_until(lambda: len(up.replicas()) == 2, START_LIMIT_S)
    assert up.complete("adapter-00001")


def test_a_stopped_replica_keeps_nobody_waiting(up: Up) -> None:
    """Its streams end with an error; requests without a token, and later ones, the other one answers."""
    body = {"model": "base", "max_tokens": 700, "stream": True, "ignore_eos": True}

    def ask(number: int) -> str:
        reply = up.post("/v1/completions", **body, prompt=f"{number}")
        last = [line for line in reply.text.split("\n\n") if line][-2:]
        return "error" if any('"error"' in event for event in last) else "whole"

    with ThreadPoolExecutor(8) as pool:
        first = keep_both_busy(up, pool, ask)
        victim = _replicas_of(up)[0]
        victim.send_signal(signal.SIGSTOP)
        try:
            later = [pool.submit(ask, i) for i in range(4, 8)]
            ends = [answer.result(LIMIT_S) for answer in first]
            assert set(ends) == {"whole", "error"}
            assert [answer.result(LIMIT_S) for answer in later] == ["whole"] * 4
        finally:
            if victim.is_running():
                victim.send_signal(signal.SIGCONT)
    wait_until(lambda: len(up.replicas()) == 2, START_LIMIT_S)


def test_a_signal_ends_it_with_all_its_processes(up: Up) -> None:
    family = psutil.Process(up.process.pid).children(recursive=True)
    assert len(up.engines()) == 2
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(LIMIT_S) == 0
    wait_until(lambda: not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE])
