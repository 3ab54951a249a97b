"""`toppings up`: from settings to an application that answers, and from a signal to its orderly end."""

import logging
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import yaml
from ray import serve

from toppings.cluster.ray_serve.app import FRONT_CPUS, make_app, serve_logging
from toppings.cluster.ray_serve.settings import UpConfig
from toppings.config import OFF, Config, ConfigError
from toppings.log_files import LOG_FORMAT
from toppings.model.files import read_json
from toppings.server.lifecycle import listening_socket, run_dir
from toppings.sources.adapters import parse_source
from toppings.sources.models import with_model

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 20.0
CONNECT_TIMEOUT_S = 5.0
POLL_S = 0.1
OBJECT_STORE_BYTES = 128 * 2**20
"""Tokens are small and pass beside Ray's object store."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray tells nobody of its use
    "RAY_worker_niceness": "0",  # engines and the front serve: they come after nobody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a front without a GPU keeps its environment
}
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class UpError(RuntimeError):
    """The application could not be started; the message says why."""


def run_up(config: UpConfig, *, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; `on_ready` is called with the URL once the application answers.

    The URL is "" where it is not ours to choose: in a cluster whose Serve was started with another address.

    Raises ConfigError, or UpError where Ray, an engine or the front did not start.
    """
    level = config.server.server.log_level.upper()
    logging.basicConfig(level=level, format=LOG_FORMAT)
    with suppress(KeyboardInterrupt), _cluster(config) as resolved:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        with _application(resolved) as url:
            on_ready(url)
            while True:
                signal.pause()


@contextmanager
def _cluster(config: UpConfig) -> Iterator[UpConfig]:
    """Ray, started here and ended with us, or a cluster that was there and stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if config.fleet.ray_address:
        if not config.server.server.port:
            raise ConfigError("port is 0; in a cluster all nodes listen on the same port: name one")
        config = config.with_cores(None)
        _check_reachable(config.fleet.ray_address)
        _init(address=config.fleet.ray_address)
    else:
        num_cores = len(os.sched_getaffinity(0))
        config = _on_this_machine(config).with_cores(num_cores)
        engines_cpus = config.fleet.most * config.fleet.cpus_per_replica
        _init(
            address="local",
            _node_ip_address=config.fleet.ray_host,
            num_cpus=FRONT_CPUS + max(num_cores, engines_cpus),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
        )
    try:
        yield config
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"ray_address is {address!r}, and no Ray answers there ({error}); write auto on a machine of the "
            "cluster, or its head's host:port"
        ) from error


def _init(**options: object) -> None:
    try:
        ray.init(logging_level=logging.WARNING, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UpError(f"Ray at {options['address']!r} is not to be had: {error}") from error


def _on_this_machine(config: UpConfig) -> UpConfig:
    """With whole paths, since replicas work elsewhere, and a free port; writes `config.yaml`."""
    engine, server = with_model(config.server.engine), config.server.server
    read_json(Path(engine.model) / "config.json")
    with listening_socket(config.server) as listener:
        port = listener.getsockname()[1]
    names = ["model", "state_dir", *(["step_log"] if engine.step_log != OFF else [])]
    paths: dict[str, Any] = {name: _whole(getattr(engine, name)) for name in names}
    places: dict[str, Any] = {name: _whole(getattr(server, name)) for name in ("adapters", "log_dir")}
    places["adapter_roots"] = tuple(map(_whole, server.adapter_roots))
    places["adapter_source"] = tuple(parse_source(text).text for text in server.adapter_source)
    resolved = Config(engine=replace(engine, **paths), server=replace(server, port=port, **places))
    directory = run_dir(resolved)
    directory.mkdir(parents=True, exist_ok=True)
    config = replace(config, server=resolved)
    settings = {name: value for name, value in config.to_settings().items() if name != "api_key"}
    (directory / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return config


def _whole(path: str) -> str:
    return str(Path(path).absolute()) if path else ""


@contextmanager
def _application(config: UpConfig) -> Iterator[str]:
    """Serve with our application, until the context ends; then without it, or not at all if Ray is ours."""
    fleet, server = config.fleet, config.server.server
    serve.start(
        http_options={"host": server.host, "port": server.port}, logging_config=serve_logging(config.server)
    )
    logging.getLogger("ray.serve").setLevel(serve_logging(config.server)["log_level"])
    try:
        try:
            serve.run(make_app(config), name=fleet.app_name, route_prefix=fleet.route_prefix)
        except RuntimeError as error:
            raise UpError(f"the application could not start: {_reason(fleet.app_name, error)}") from error
        yield _await_answer(config)
    finally:
        if fleet.ray_address:
            serve.delete(fleet.app_name)
        else:
            serve.shutdown()


def _reason(app_name: str, error: RuntimeError) -> str:
    """The last line of what a deployment that failed says: there stands the exception of its replica."""
    for deployment in serve.status().applications[app_name].deployments.values():
        lines = deployment.message.strip().splitlines()
        if "Traceback" in deployment.message:
            return str(lines[-1])
    return str(error)


def _await_answer(config: UpConfig) -> str:
    """The application's URL, once it answers there; "" where it does not, as Serve was there before us."""
    fleet, server = config.fleet, config.server.server
    prefix = fleet.route_prefix.rstrip("/")
    own = _url(ANY_ADDRESS.get(server.host, server.host), server.port) + prefix
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{own}/health", timeout=ANSWER_TIMEOUT_S):
                return _url(server.host, server.port) + prefix
        except OSError:
            time.sleep(POLL_S)
    return ""


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
