"""A server whose engine dies or hangs, and whose disks are full: a process with the demo's model."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import PATIENCE_S, wait_until
from toppings.backlog import COMPLAIN_S
from toppings.cluster.router.exchange import Exchange
from toppings.cluster.router.meters import Meters

DEPLOY = Path(__file__).parents[2] / "deploy"
HISTOGRAM_ENDS = ("_bucket", "_sum", "_count")
PROMETHEUS_OWN = {"job", "instance"}
"""Labels that it sets itself: where we had them, ours would be renamed."""
FUNCTIONS = {"histogram_quantile", "label_values"}
READY = re.compile(r"the engine's process (\d+) is ready")


class Serving:
    def __init__(self, root: Path, *options: str) -> None:
        self.logs = root / "logs"
        command = [sys.executable, "-m", "toppings", "serve", "--model", "demo"]
        command += [
            "--port",
            "0",
            "--num-threads",
            "1",
            "--log-dir",
            str(self.logs),
            "--state-dir",
            str(root / "state"),
            *options,
        ]
        self.stderr = (root / "stderr").open("w+")
        self.temporary = root / "tmp"
        self.temporary.mkdir()
        environment = {**os.environ, "TMPDIR": str(self.temporary)}
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(command, stderr=self.stderr, env=environment)
        self.url = self._await(r"Uvicorn running on (\S+)")

    @property
    def output(self) -> str:
        return Path(self.stderr.name).read_text()

    @property
    def engine(self) -> int:
        """Its process id."""
        return int(READY.findall(self.output)[-1])

    def _await(self, pattern: str) -> str:
        while (found := re.search(pattern, self.output)) is None:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < self.started_at + 2 * PATIENCE_S, self.output
            time.sleep(0.05)
        return found[1]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE_S)

    def complete(self, max_tokens: int = 4, **body: object) -> httpx.Response:
        body = {"prompt": "What is the sea?", "max_tokens": max_tokens, "temperature": 0, **body}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE_S)

    def await_good_answer(self) -> float:
        """Seconds until one came."""
        started_at = time.monotonic()
        wait_until(lambda: self.complete().status_code == 200)
        return time.monotonic() - started_at

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stderr.close()


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Its step log is a full disk. A stopped engine is found long before it is silent for too long."""
    root = tmp_path_factory.mktemp("serving")
    (root / "logs" / "auto").mkdir(parents=True)
    (root / "logs" / "auto" / "server.log").symlink_to("/dev/full")
    (root / "logs" / "auto" / "config.yaml").symlink_to("/dev/full")
    serving = Serving(root, "--step-log", "/dev/full", "--heartbeat-timeout-s", "60")
    yield serving
    serving.close()


def test_full_log_disks_stop_nothing_and_are_told_once(serving: Serving) -> None:
    for _ in range(3):
        assert serving.complete().status_code == 200
    metrics = serving.get("/metrics").text
    dropped = re.search(r'^toppings:log_dropped_total\{file="steps.jsonl"\} (\S+)', metrics, re.M)
    assert dropped is not None
    assert float(dropped[1]) >= 3
    num_minutes = 1 + (time.monotonic() - serving.started_at) // COMPLAIN_S
    num_told = serving.output.count("cannot be written, lines are dropped")
    assert num_told <= 3 * num_minutes  # a file and process
    assert "the configuration is not kept" in serving.output
    assert "Traceback" not in serving.output


def queries() -> dict[str, str]:
    """Of the dashboard and the alerts, by where they stand."""
    board = json.loads((DEPLOY / "grafana.json").read_text())
    found = {f"{p['title']} {t['refId']}": t["expr"] for p in board["panels"] for t in p["targets"]}
    groups = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    return found | {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def test_dashboard_and_alerts_ask_for_what_a_server_and_a_router_tell(serving: Serving) -> None:
    serving.await_good_answer()
    assert serving.complete(model="pirate").status_code == 200  # a cold start
    meters = Meters()
    for metric in (meters.sent, meters.retries, meters.in_flight, meters.is_up, meters.ended):
        metric.labels("one")
    meters.note_exchange(Exchange("", status=429, owner="team", rejected_by="tenant"))
    told = httpx.get(f"{serving.url}/metrics").text + meters.render().decode()
    families = {family.name: family for family in text_string_to_metric_families(told)}
    known = {sample.name for family in families.values() for sample in family.samples} | {"up"}
    # Of a counter with labels there is no sample before it counts.
    known |= {f"{name}_total" for name, family in families.items() if family.type == "counter"}
    known |= {f"{n}{end}" for n, f in families.items() if f.type == "histogram" for end in HISTOGRAM_ENDS}
    known |= {name for name, family in families.items() if family.type == "gauge"}
    for place, query in queries().items():
        bare = re.sub(r'"[^"]*"|\[[^]]*\]|by \([^)]*\)|\{[^}]*\}', " ", query)
        names = set(re.findall(r"[a-z_]+:[a-z_0-9]+|\b[a-z]+_[a-z_0-9]+|\bup\b", bare)) - FUNCTIONS
        assert names, place
        assert names <= known, (place, names - known)
    labels = {label for f in families.values() for sample in f.samples for label in sample.labels}
    assert not labels & PROMETHEUS_OWN
    text = (DEPLOY / "grafana.json").read_text() + (DEPLOY / "alerts.yaml").read_text()
    asked = {name for names in re.findall(r"by \(([^)]*)\)", text) for name in names.split(", ")}
    asked |= set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", text))
    asked |= set(re.findall(r"(\w+)=~?\\?\"", text))
    assert asked <= labels | PROMETHEUS_OWN


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_requests_of_an_engine_that_goes_are_answered_and_the_next_ones_served(
    serving: Serving, number: signal.Signals
) -> None:
    serving.await_good_answer()
    replies: dict[bool, httpx.Response] = {}
    old = serving.engine

    def ask(stream: bool) -> None:
        replies[stream] = serving.complete(1900, ignore_eos=True, stream=stream)

    callers = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for caller in callers:
        caller.start()
    wait_until(lambda: serving.get("/stats").json()["num_running"] == 2)
    os.kill(old, number)
    gone_at = time.monotonic()
    for caller in callers:
        caller.join(PATIENCE_S)
    assert replies[False].status_code == 503
    for reply in (replies[False], replies[True]):  # a stream that had begun ends with an event
        assert f"process {old}" in reply.text
        assert "EngineDeadError" in reply.text
    serving.await_good_answer()
    print(f"served again after {time.monotonic() - gone_at:.1f} s")
    assert serving.engine != old
    with pytest.raises(ProcessLookupError):
        os.kill(old, 0)


def test_health_tells_that_the_engine_is_restarting(serving: Serving) -> None:
    serving.await_good_answer()
    os.kill(serving.engine, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while (health := serving.get("/health")).status_code == 200:
        assert time.monotonic() < deadline
    ready, refused = serving.get("/ready"), serving.complete()
    assert "the engine is restarting" in health.json()["status"]
    assert (ready.status_code, refused.status_code) == (503, 503)
    assert refused.headers["retry-after"] == "1"
    serving.await_good_answer()
    assert serving.get("/health").status_code == 200


def test_nothing_is_left_in_the_temporary_folder_while_it_serves(serving: Serving) -> None:
    serving.await_good_answer()
    assert not list(serving.temporary.glob("toppings-meet-engine-*"))


def test_two_signals_end_it_although_the_engine_is_stopped(serving: Serving) -> None:
    """The last test of this server."""
    serving.await_good_answer()
    engine = serving.engine
    os.kill(engine, signal.SIGSTOP)
    for _ in range(2):
        serving.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert serving.process.wait(PATIENCE_S) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)
