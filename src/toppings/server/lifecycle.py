"""From a configuration to a server that listens, and from a signal to its orderly end."""

import asyncio
import gc
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, cast

import uvicorn
import yaml
from fastapi import FastAPI

from toppings.access import with_api_key
from toppings.adapters.registry import AdapterRegistry
from toppings.adapters.state_lock import StateLock
from toppings.bad_input import shown
from toppings.cluster.measured import read_perf_model
from toppings.cluster.perf_model import PerfModel
from toppings.config import Config, ConfigError
from toppings.engine.client import EngineClient
from toppings.engine.process import EngineLog
from toppings.engine.spawn import Spawner
from toppings.exchanges.log_lines import NamingFormatter
from toppings.log_files import LOG_FORMAT, log_handlers
from toppings.server.app import create_app
from toppings.server.connections import Connections, raise_connection_limit
from toppings.server.exchange import current_exchange
from toppings.server.limits import MAX_HEAD_BYTES, MAX_URL_BYTES
from toppings.server.records import keeping_records
from toppings.server.resolver import drop_unconfigured
from toppings.server.state import ServerState
from toppings.sources.adapters import parse_source
from toppings.sources.models import find_model, with_model
from toppings.stop import Stop
from toppings.tenants.book import TenantBook
from toppings.text import TextModel
from toppings.tracing import check_endpoint

logger = logging.getLogger(__name__)

FLUSH_S = 2.0
"""How long the last answers may take to leave once the engine has ended."""
START_END_S = 0.5
"""How long a start that is given up may take to end what it has begun."""
IDLE_CONNECTION_S = 75
"""Longer than clients keep an idle connection (httpx 5 s, aiohttp 15 s): one that is closed as a request
arrives on it loses that request."""


def run_server(config: Config, spawner: Spawner) -> int:
    """Serve until a signal or the engine's death; the exit code: 0 after a signal, 1 otherwise. `spawner`
    starts the engines.

    Raises ConfigError, ValueError, OSError or EngineStartError where the server cannot start.
    """
    TenantBook(config.server.tenants_file)  # mistakes are told before an engine starts
    if config.server.otlp_traces_endpoint:
        check_endpoint(config.server.otlp_traces_endpoint)
    for source in config.server.adapter_source:
        parse_source(source)
    config = with_run_files(config)
    start_logging(config)
    return asyncio.run(_serve(with_api_key(config), spawner))


def run_dir(config: Config) -> Path:
    return Path(config.server.log_dir) / config.engine.mode


def log_file(config: Config) -> Path:
    return run_dir(config) / "server.log"


def with_run_files(config: Config) -> Config:
    """`config` with its model, built-in adapters and step log resolved, written beside the logs (without the
    key), or said why it is not: nobody is kept from serving by a full disk."""
    directory = run_dir(config)
    engine = with_model(config.engine)
    engine = replace(engine, step_log=engine.step_log or str(directory / "steps.jsonl"))
    adapters = config.server.adapters or str(find_model(engine.model).adapters or "")
    config = Config(engine=engine, server=replace(config.server, adapters=adapters))
    settings = {name: value for name, value in config.to_settings().items() if name != "api_key"}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    except OSError as error:
        logger.warning("the configuration is not kept in %s: %s", directory, error)
    return config


def start_logging(config: Config) -> None:
    """To standard error and to the run's `server.log`; that of the run before becomes `server.log.1`."""
    file = log_file(config)
    with suppress(OSError):
        if file.is_file() and file.stat().st_size:  # no device
            file.replace(file.with_name(file.name + ".1"))
        file.touch()  # opened to append, as the engine's process does
    handlers = log_handlers(str(file), config.engine.max_log_bytes)
    for handler in handlers:
        handler.setFormatter(NamingFormatter(LOG_FORMAT, current_exchange.get))
    logging.basicConfig(level=config.server.log_level.upper(), handlers=handlers, force=True)


async def _serve(config: Config, spawner: Spawner) -> int:
    stop = Stop(config.server.shutdown_timeout_s)
    with stop.on_signals(), listening_socket(config) as listener:
        startup = asyncio.create_task(_start(config, spawner))
        await stop.or_done(startup)
        if not startup.done():
            startup.cancel()
            await asyncio.wait({startup}, timeout=START_END_S)
            _leave(spawner)
        client, registry, text, perf_model = startup.result()
        try:
            app = create_app(client, registry, text, config, perf_model)
            with keeping_records(app, config, run_dir(config)):
                return await run_until_stopped(config, app, client, listener, stop)
        finally:
            await client.shutdown(0.0)
            registry.close()


def _leave(spawner: Spawner) -> NoReturn:
    """Ends a process that has not served yet, whose threads import or read what may take long: an orderly end
    would wait for them, though there is nothing of theirs to keep."""
    spawner.close()
    logging.shutdown()
    os._exit(0)


async def _start(
    config: Config, spawner: Spawner
) -> tuple[EngineClient, AdapterRegistry, TextModel, PerfModel | None]:
    """The engine reads the model while adapters are registered here, and the registry once they are."""
    lock = await asyncio.to_thread(_hold_state, config)  # before an engine is started for nothing
    registering = asyncio.create_task(asyncio.to_thread(_registry, config, lock))
    log = EngineLog(config.server.log_level, str(log_file(config)))
    restarts = config.server.max_engine_restarts
    client = asyncio.create_task(
        EngineClient.start(config.engine, after=registering, log=log, max_restarts=restarts, spawner=spawner)
    )
    try:
        registry = await registering  # before the tokeniser: two threads must not import transformers at once
        perf_model = read_perf_model(config.server.perf_model_file, config.engine, registry)
        text = await asyncio.to_thread(_text_model, config)
        started = await client, registry, text, perf_model
        settle_heap()
        return started
    except BaseException:
        client.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await (await client).shutdown(0.0)
        raise


def settle_heap() -> None:
    """What is there now stays for good, and no collection of garbage looks at it again: one that did would
    hold the event loop for a fifth of a second, whenever a thread has made enough objects."""
    gc.collect()
    gc.freeze()


def _text_model(config: Config) -> TextModel:
    from toppings.engine.base import model_path

    return TextModel.load(model_path(config.engine))


def _hold_state(config: Config) -> StateLock:
    from toppings.engine.base import hold_state

    return hold_state(config.engine, "toppings serve")


def _registry(config: Config, lock: StateLock) -> AdapterRegistry:
    from toppings.engine.base import open_registry

    registry = open_registry(config.engine, lock)
    registry.register_directory(config.server.adapters or None).log()
    drop_unconfigured(registry, config.server)
    registry.clean_up()
    logger.info("%d adapters are registered in %s", registry.count(), registry.state_dir)
    return registry


async def run_until_stopped(
    config: Config, app: FastAPI, client: EngineClient, listener: socket.socket, stop: "Stop"
) -> int:
    server = _make_server(config, app)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    died = asyncio.create_task(client.died.wait())
    await stop.or_done(serving, died)
    if stop.is_set:
        await _drain(app.state.toppings, client, stop)
    elif serving.done():
        logger.error("the HTTP server has ended; so does the rest", exc_info=serving.exception())
    else:
        logger.error("%s; the server ends", client.down_reason)
        await _flush(app.state.toppings)
    died.cancel()
    app.state.feed.close()
    server.should_exit = True
    with suppress(Exception):  # told above
        await serving
    return 0 if stop.is_set else 1


async def _drain(state: ServerState, client: EngineClient, stop: "Stop") -> None:
    """New requests get 503; running ones finish, or are cut at the deadline or a second signal."""
    timeout_s = state.config.server.shutdown_timeout_s
    logger.info("shutting down; requests that get up to %g s: %d", timeout_s, state.num_open)
    state.is_draining = True
    if state.resolver is not None:
        state.resolver.close()
    stop.rearm()
    shutdown = asyncio.create_task(client.shutdown(timeout_s))
    await stop.or_done(shutdown)
    if not shutdown.done():
        await client.shutdown(0.0)
    await shutdown
    stop.is_set = True
    await _flush(state)


async def _flush(state: ServerState) -> None:
    """Let the answers that are ready reach their clients."""
    deadline = asyncio.get_running_loop().time() + FLUSH_S
    while state.num_open and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)


class _Server(uvicorn.Server):
    """Leaves signals to `Stop`, as a signal means draining first; names the address of a given socket."""

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self._connections = connections

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        self._connections.sweep()
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or []:
            host, port = listener.getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            logging.getLogger("uvicorn.error").info("Uvicorn running on %s (Press CTRL+C to quit)", url)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _make_server(config: Config, app: FastAPI) -> _Server:
    """Forwarding headers are not trusted: a client's address is the one it has connected from."""
    connections = Connections(
        max_open=raise_connection_limit(),
        receive_timeout_s=config.server.receive_timeout_s,
        send_timeout_s=config.server.send_timeout_s,
    )
    return _Server(
        uvicorn.Config(
            app,
            http=cast(type[asyncio.Protocol], connections.protocol),
            ws="none",
            h11_max_incomplete_event_size=MAX_HEAD_BYTES + MAX_URL_BYTES,
            host=config.server.host,
            port=config.server.port,
            log_config=None,
            access_log=config.server.log_level == "debug",
            proxy_headers=False,
            lifespan="off",
            timeout_keep_alive=IDLE_CONNECTION_S,
            timeout_graceful_shutdown=int(FLUSH_S),
        ),
        connections,
    )


def listening_socket(config: Config) -> socket.socket:
    """Bound before the engine starts, so that a taken port is told at once; nobody is answered yet."""
    host, port = config.server.host, config.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP: only then does asyncio switch off Nagle's algorithm, which delays small events by 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, TypeError, UnicodeError) as error:  # the last two of a name that none can have
        listener.close()
        raise ConfigError(f"cannot listen on {shown(host)}:{port}: {error}") from error
    return listener
