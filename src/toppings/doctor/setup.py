"""The configuration: its model, state directory, disks, port, keys, tenants and logs."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from toppings.access import is_loopback, with_api_key
from toppings.adapters.directories import find_adapters
from toppings.adapters.errors import AdapterError, StateError, StateHeldError
from toppings.adapters.state_lock import OWNER, StateLock
from toppings.config import Config, ServerConfig
from toppings.doctor.finding import Finding, gib, good, note, wrong
from toppings.sources.adapters import parse_source
from toppings.tenants.book import TenantBook
from toppings.tracing import check_endpoint

MIN_DISK_BYTES = 2**30


def look(config: Config) -> Iterator[Finding]:
    yield from _model(config)
    yield from _port(config)
    yield from _keys(config)
    yield from _adapters(config.server)
    yield _disk("logs", Path(config.server.log_dir))
    if config.server.otlp_traces_endpoint:
        yield from _traces(config.server.otlp_traces_endpoint)


def _model(config: Config) -> Iterator[Finding]:
    from toppings.engine.base import dtype_name, model_config, served_model_name, state_dir

    try:
        model = model_config(config.engine)
        name, directory = served_model_name(config.engine), state_dir(config.engine)
    except (ValueError, OSError) as error:
        yield wrong("model", str(error), "--model: a directory, a hub's name, or demo")
        return
    dtype = dtype_name(config.engine, model)
    yield good(
        "model",
        f"{name}, in {dtype}: {model.num_layers} layers, {model.max_position_embeddings} tokens at most",
    )
    yield from _state(config, directory)
    yield _disk("disk of the state", directory)


def _state(config: Config, directory: Path) -> Iterator[Finding]:
    if not (directory / OWNER).exists():
        yield good("state", f"{directory} is not there yet, and will be made")
        return
    try:
        StateLock.take(directory, "toppings doctor").close()
    except StateHeldError as error:
        yield wrong("state", str(error), "--state-dir, or end that process")
        return
    except StateError as error:
        yield wrong("state", str(error), "--state-dir, or the directory's rights")
        return
    from toppings.adapters.rows import check_rows
    from toppings.engine.base import open_registry

    try:
        check_rows(directory)
        registry = open_registry(config.engine)
        with suppress(OSError):
            yield good("state", f"{directory}, {registry.count()} adapters")
        registry.close()
    except (ValueError, StateError, OSError) as error:
        yield wrong("state", str(error), "--state-dir, or what the message says")
        return
    profiles = sorted(path.name for path in directory.glob("cold-start-*.json"))
    if not profiles and config.engine.mode in ("auto", "cpu_assisted", "cpu_shrink"):
        advice = "nothing: the first start measures it where it is needed; or `toppings profile cold-start`"
        yield note("cold starts", "not measured here yet", advice)


def _adapters(server: ServerConfig) -> Iterator[Finding]:
    if server.adapters:
        try:
            found, failures = find_adapters(server.adapters)
        except AdapterError as error:
            yield wrong("adapters", str(error), "--adapters")
        else:
            yield good("adapters", f"{len(found)} in {server.adapters}")
            for name, reason in failures.items():
                yield note("adapters", f"{name}: {reason}", "what the message says; it is left out")
    for root in server.adapter_roots:
        if not Path(root).is_dir():
            yield wrong("adapter roots", f"there is no directory {root}", "--adapter-roots")
    for source in server.adapter_source:
        try:
            parse_source(source)
        except ValueError as error:
            yield wrong("adapter source", str(error), "--adapter-source")


def _disk(topic: str, directory: Path) -> Finding:
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        return wrong(topic, f"{place} may not be written", "its owner and rights, or another directory")
    free = shutil.disk_usage(place).free
    if free < MIN_DISK_BYTES:
        return note(topic, f"{gib(free)} free at {place}", "make room: what does not fit is answered 507")
    return good(topic, f"{gib(free)} free at {place}")


def _port(config: Config) -> Iterator[Finding]:
    server = config.server
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((server.host, server.port))
        except (OSError, UnicodeError) as error:
            yield wrong("port", f"cannot listen on {server.host}:{server.port}: {error}", "--port, --host")
            return
    yield good("port", f"{server.host}:{server.port} is free")


def _keys(config: Config) -> Iterator[Finding]:
    try:
        server = with_api_key(config).server
        book = TenantBook(server.tenants_file, server.api_key)
    except (ValueError, OSError) as error:
        yield wrong("keys", str(error), "the file that it names")
        return
    if server.tenants_file:
        yield good("keys", f"{len(book.accounts)} tenants in {server.tenants_file}")
    elif server.api_key:
        yield good("keys", "one key, for everything")
    elif is_loopback(server.host):
        yield good("keys", "none: clients of this machine may do everything")
    else:
        text = f"none, and {server.host} is open to other machines: whoever reaches it may generate"
        yield note("keys", text, "TOPPINGS_API_KEY, --api-key-file or --tenants-file")


def _traces(endpoint: str) -> Iterator[Finding]:
    try:
        url = check_endpoint(endpoint)
        from opentelemetry.exporter.otlp.proto.http import trace_exporter  # noqa: F401
    except ModuleNotFoundError:
        yield wrong("traces", "OpenTelemetry is not installed", "pip install 'toppings[otel]'")
    except ValueError as error:
        yield wrong("traces", str(error), "--otlp-traces-endpoint")
    else:
        yield good("traces", f"to {url}")
