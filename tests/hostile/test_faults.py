"""Processes that die or hang, full disks, a locked registry: what was asked is answered or refused in time.

Requests are served again where something is left to serve.

The bounds of time here are for any machine; `benchmarks/soak.py` measures.
"""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from hostile.faults import SmallDisk, kill, locked_registry, served_again, stopped, wait_for
from hostile.fuzzing import demo_workshop
from hostile.load import BASE, Client
from hostile.served import ENGINE, WORKER, Served
from hostile.tally import Tally

from tests.assist.world import PROFILE
from tests.waiting import PATIENCE_S
from toppings.config import EngineConfig
from toppings.engine.assist import profile_path

ANY_MACHINE_S = PATIENCE_S
MODELS = ["pirate", "haiku", BASE]
OPTIONS = (
    *("--num-threads", "1", "--mode", "cpu_assisted", "--assist-workers", "1", "--max-model-len", "512"),
    *("--kv-cache-bytes", "64MB"),
)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roots")


@pytest.fixture(scope="module")
def full_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for logs whose disk is full from the start."""
    folder = tmp_path_factory.mktemp("logs") / "cpu_assisted"
    folder.mkdir()
    for name in ("server.log", "steps.jsonl"):
        (folder / name).symlink_to("/dev/full")
    return folder.parent


@pytest.fixture(scope="module")
def state_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk | None]:
    """None where this process may not mount one."""
    try:
        disk = SmallDisk(tmp_path_factory.mktemp("disk") / "state", 16 * 2**20)
    except PermissionError:
        yield None
        return
    yield disk
    disk.close()


def write_profile(state_dir: Path) -> None:
    """What a cold start costs, so that the server need not measure it."""
    config = EngineConfig(mode="cpu_assisted", num_threads=1, assist_workers=1)
    path = profile_path(config, state_dir)
    here, there = (f"threads{number}-" for number in (torch.get_num_threads(), config.num_threads))
    path.parent.mkdir()
    path.with_name(path.name.replace(here, there)).write_text(PROFILE.to_json())


@pytest.fixture(scope="module")
def served(
    roots: Path, full_logs: Path, state_disk: SmallDisk | None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """One server for all: whatever happens to it, it is to serve on. Its log's disk is full all the time."""
    folder = tmp_path_factory.mktemp("server")
    state = (folder if state_disk is None else state_disk.path) / "server"
    write_profile(state)
    options = (*OPTIONS, "--adapter-roots", str(roots))
    with Served(folder, *options, log_dir=full_logs, state_dir=state) as served:
        for model in MODELS:
            assert served.complete(model)[0] == 200
        yield served


@contextmanager
def loaded(served: Served, num_clients: int = 6) -> Iterator[Tally]:
    """Clients that wait, stream and leave, from a thread of their own, while the block runs; after it, every
    request is accounted for."""
    tally = Tally(limit_s=ANY_MACHINE_S)
    stop = threading.Event()

    async def run() -> None:
        ended = asyncio.Event()
        async with Client(served.url, tally, models=MODELS, folders=[]) as client:
            load = asyncio.create_task(client.run(ended, num_clients, 0.1))
            while not stop.is_set():
                await asyncio.sleep(0.02)
            ended.set()
            await load

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        wait_for(lambda: tally.answered >= num_clients, ANY_MACHINE_S, "the load runs")
        yield tally
    finally:
        stop.set()
        thread.join()
    assert (tally.open, tally.lost, tally.faults) == (0, 0, 0), tally.as_dict()


def process(served: Served, part: str) -> psutil.Process:
    found: list[psutil.Process] = []

    def is_there() -> bool:
        found.extend(filter(None, [served.find(part)]))
        return bool(found)

    wait_for(is_there, ANY_MACHINE_S, f"{part} is there")
    return found[0]


def is_replaced(served: Served, old: psutil.Process, part: str) -> Callable[[], bool]:
    return lambda: served.find(part) not in (None, old)


def test_a_server_whose_log_disk_is_full_serves(served: Served) -> None:
    with loaded(served) as tally:
        served_again(served, "pirate", ANY_MACHINE_S)
    assert tally.refused.total() < tally.sent


def test_a_killed_worker_loses_no_request(served: Served) -> None:
    with loaded(served):
        old = process(served, WORKER)
        kill(old)
        served_again(served, "haiku", ANY_MACHINE_S)
    wait_for(is_replaced(served, old, WORKER), ANY_MACHINE_S, "another worker starts")


def test_a_worker_that_hangs_loses_no_request(served: Served) -> None:
    with loaded(served), stopped(process(served, WORKER)):
        served_again(served, "pirate", ANY_MACHINE_S)


@pytest.mark.parametrize(
    "end", [kill, lambda engine: engine.send_signal(signal.SIGSTOP)], ids=["dies", "hangs"]
)
def test_an_engine_that_ends_or_hangs_is_replaced_and_its_requests_are_answered(
    served: Served, end: Callable[[psutil.Process], None]
) -> None:
    with loaded(served) as tally:
        old = process(served, ENGINE)
        end(old)
        wait_for(is_replaced(served, old, ENGINE), ANY_MACHINE_S, "another engine starts")
        served_again(served, "pirate", ANY_MACHINE_S)
        before = tally.answered
        wait_for(lambda: tally.answered > before + 5, ANY_MACHINE_S, "the load is served again")
    assert set(tally.refused) <= {400, 404, 503}
    served.wait_until_ready(ANY_MACHINE_S)


def test_a_server_that_was_stopped_for_a_while_answers_what_was_asked_meanwhile(served: Served) -> None:
    with loaded(served), stopped(psutil.Process(served.process.pid)):
        time.sleep(1.0)


def test_requests_are_served_while_another_process_holds_the_registry(served: Served) -> None:
    with loaded(served), locked_registry(served.state_dir):
        for model in MODELS:
            assert served.complete(model)[0] == 200  # one that waits is refused
        for path in ("/health", "/ready", "/stats", "/v1/models"):
            assert served.ask(path)[0] == 200


def test_an_adapter_is_refused_with_a_reason_while_another_process_holds_the_registry(
    served: Served, roots: Path
) -> None:
    path = demo_workshop().write(roots / "locked-out")
    with locked_registry(served.state_dir):
        status, content = served.load("locked-out", path)
    assert status == 503, content
    assert served.load("locked-out", path)[0] == 200
    assert served.ask("/v1/unload_lora_adapter", {"lora_name": "locked-out"})[0] == 200


@contextmanager
def full_state_disk(served: Served, disk: SmallDisk | None) -> Iterator[None]:
    """Without a disk of its own, the server may write no file beyond a thousand bytes."""
    server = psutil.Process(served.process.pid)
    limits = server.rlimit(psutil.RLIMIT_FSIZE)
    if disk is None:
        server.rlimit(psutil.RLIMIT_FSIZE, (1000, limits[1]))
    else:
        disk.fill()
    try:
        yield
    finally:
        if disk is None:
            server.rlimit(psutil.RLIMIT_FSIZE, limits)
        else:
            disk.free()


def test_a_full_disk_refuses_adapters_as_the_servers_fault_and_serves_requests(
    served: Served, roots: Path, state_disk: SmallDisk | None
) -> None:
    path = demo_workshop().write(roots / "no-room")
    with loaded(served), full_state_disk(served, state_disk):
        status, content = served.load("no-room", path)
        assert status in ((507,) if state_disk else (503, 507)), content
        for model in MODELS:
            assert served.complete(model)[0] == 200
    assert served.load("no-room", path)[0] == 200
    assert served.ask("/v1/unload_lora_adapter", {"lora_name": "no-room"})[0] == 200


def test_half_requests_keep_nobody_out(served: Served) -> None:
    half = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 90\r\n\r\n{"
    connections = [socket.create_connection(("127.0.0.1", served.port), 10) for _ in range(200)]
    try:
        for connection in connections:
            connection.sendall(half)
        served_again(served, "pirate", ANY_MACHINE_S)
        assert served.wait_until_idle()["num_open"] == 0
    finally:
        for connection in connections:
            connection.close()


def test_a_server_that_is_killed_leaves_no_process_behind(served: Served) -> None:
    """The last of this server: nothing is left to serve, and nothing may stay."""
    others = served.tree()[1:]
    assert others
    os.kill(served.process.pid, signal.SIGKILL)
    served.process.wait()
    wait_for(lambda: not any(p.is_running() for p in others), ANY_MACHINE_S, "its processes end")
