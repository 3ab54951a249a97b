"""The router's frozen settings, their defaults and their YAML."""

import math
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from toppings.access import KEY_VARIABLE, UPSTREAM_KEY_VARIABLE, read_api_key
from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.placement import NO_PLACEMENT, PLACEMENTS
from toppings.cluster.policies import POLICIES
from toppings.config import LOG_LEVELS, SWITCH, ConfigError, Settings, setting

_ID = re.compile(r"[A-Za-z0-9._:@\[\]~+=-]{1,128}")
_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
"""What dots part in a host's name."""
_URL = re.compile(r"[!-~]{1,2000}")


@dataclass(frozen=True, kw_only=True)
class InstanceConfig:
    """One server. `instance_id` defaults to the URL's host and port; `perf_model` overrides its report.
    `max_cpu_loras`: adapters that a placement may have there, those it lists by itself among them (0: as many
    as it says that its device holds, which is vLLM's own default)."""

    url: str
    instance_id: str = ""
    perf_model: str = ""
    max_cpu_loras: int = 0

    def __post_init__(self) -> None:
        host = _host_of(self.url)
        object.__setattr__(self, "url", self.url.rstrip("/"))
        object.__setattr__(self, "instance_id", self.instance_id or host)
        if not _ID.fullmatch(self.instance_id):
            raise ConfigError(
                f"instance id is {self.instance_id[:200]!r}; it must be 1 to 128 letters, digits or "
                "characters of . _ : @ [ ] ~ + = -"
            )
        if self.perf_model:
            _check_perf_model(self.perf_model)
        if isinstance(self.max_cpu_loras, bool) or not isinstance(self.max_cpu_loras, int):
            raise ConfigError(f"max_cpu_loras is {self.max_cpu_loras!r}; it must be a whole number")
        if self.max_cpu_loras < 0:
            raise ConfigError(f"max_cpu_loras is {self.max_cpu_loras}; it must be at least 0")

    @classmethod
    def of(cls, value: Any) -> "InstanceConfig":
        """From a URL, or a mapping with `url` and perhaps other settings. Raises ConfigError."""
        if isinstance(value, InstanceConfig):
            return value
        if isinstance(value, str):
            return cls(url=value)
        if not isinstance(value, dict) or not isinstance(value.get("url"), str):
            raise ConfigError(f"instance {value!r} must be a URL or a mapping with a url")
        known = ("url", "id", "perf_model", "max_cpu_loras")
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise ConfigError(f"unknown instance setting {unknown[0]!r}; known: {', '.join(known)}")
        return cls(
            url=value["url"],
            instance_id=str(value.get("id") or ""),
            perf_model=str(value.get("perf_model") or ""),
            max_cpu_loras=value.get("max_cpu_loras") or 0,
        )


def _instances(value: Any) -> tuple[InstanceConfig, ...]:
    values = value.split(",") if isinstance(value, str) else value
    if not isinstance(values, list | tuple):
        raise ConfigError(f"setting instances is {value!r}; it must be a list of servers")
    return tuple(InstanceConfig.of(each) for each in values)


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Settings):
    """What `toppings route` reads. Times in seconds unless named otherwise, sizes in bytes."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8090, "port to listen on (0: any free one)", at_least=0, at_most=65535)
    instances: tuple[InstanceConfig, ...] = setting(
        (), "servers: URLs, or mappings of url, id and perf_model", read=_instances
    )
    policy: str = setting("rank_aware", "how an instance is chosen", choices=tuple(POLICIES))
    placement: str = setting(NO_PLACEMENT, "which servers adapters are kept on", choices=tuple(PLACEMENTS))
    num_copies: int = setting(2, "servers of each adapter (static_k, shuffle_shard)", above=0)
    placement_interval_s: float = setting(2.0, "between two looks at where adapters should be", above=0)
    prefix_routing: str = setting(
        "on", "count what a server has computed of a prompt before (rank_aware policies)", choices=SWITCH
    )
    slo_tpt_ms: float = setting(math.inf, "objective for time per token (inf: none)", above=0)
    slo_ttft_ms: float = setting(
        math.inf, "objective for the time until the first token (inf: none)", above=0
    )
    slo_admission: str = setting(
        "off", "answer interactive requests 429 that no server could take in time", choices=SWITCH
    )
    max_held: int = setting(
        4096, "batch requests that wait at once, half of them of one tenant; more are answered 429", above=0
    )
    batch_wait_s: float = setting(600.0, "that a batch request waits for room within the objectives", above=0)
    seed: int = setting(0, "seed of policies that draw")
    candidates: int = setting(0, "servers drawn for each request to choose from (0: all)", at_least=0)
    perf_model: str = setting(
        "published:mbgmv", "model of servers that report none: a file or a shipped name"
    )
    api_key: str = setting(
        "", f"bearer token asked of every route but health (empty: api_key_file, or ${KEY_VARIABLE})"
    )
    api_key_file: str = setting("", "file that holds it")
    tenants_file: str = setting(
        "", "YAML file of tenants, their rights, limits and keys; read anew when it has changed"
    )
    upstream_api_key: str = setting(
        "",
        "bearer token sent to the servers (empty: upstream_api_key_file, or "
        f"${UPSTREAM_KEY_VARIABLE}, or the client's own)",
    )
    upstream_api_key_file: str = setting("", "file that holds it")
    connect_timeout_s: float = setting(2.0, "to connect to a server", above=0)
    first_token_timeout_s: float = setting(
        120.0, "until a stream's first token, then the request goes elsewhere", above=0
    )
    response_timeout_s: float = setting(600.0, "until the answer to a request that does not stream", above=0)
    idle_timeout_s: float = setting(60.0, "between two tokens of a stream", above=0)
    stream_timeout_s: float = setting(3600.0, "of a whole stream; a longer one is cut", above=0)
    head_timeout_s: float = setting(10.0, "until a client has sent a request's head", above=0)
    body_timeout_s: float = setting(60.0, "until a client has sent a request's body", above=0)
    write_timeout_s: float = setting(
        60.0, "that a client takes nothing of its answer; then it is dropped", above=0
    )
    health_interval_s: float = setting(1.0, "between two checks of a server", above=0)
    health_timeout_s: float = setting(2.0, "until a check counts as failed", above=0)
    unhealthy_after: int = setting(2, "failures in a row after which a server gets no requests", above=0)
    admin_timeout_s: float = setting(
        60.0, "until a server has loaded or unloaded an adapter; then the next", above=0
    )
    sync_interval_s: float = setting(30.0, "between two looks at which models a server has", above=0)
    max_attempts: int = setting(3, "servers that a request is tried on", above=0)
    retry_after_s: int = setting(1, "Retry-After when no server can take a request", above=0)
    migration_interval_s: float = setting(0.1, "between two rebalancings of waiting requests", above=0)
    max_body_bytes: int = setting(32 * 2**20, "largest request body", above=0)
    max_buffered_bytes: int = setting(
        2**30, "bodies of all requests together; more are answered 503", above=0
    )
    max_answer_bytes: int = setting(
        64 * 2**20, "largest answer that is no stream; a larger one is no answer", above=0
    )
    response_tokens: float = setting(128.0, "expected response length before any was seen", above=0)
    bytes_per_token: float = setting(4.0, "to estimate a text prompt's tokens", above=0)
    default_rank: int = setting(16, "rank of adapters whose rank nobody tells", above=0)
    state_file: str = setting("", "where adapters loaded through the router are remembered (empty: nowhere)")
    otlp_traces_endpoint: str = setting(
        "",
        "OTLP receiver that traces are sent to over HTTP, such as http://localhost:4318/v1/traces (needs the"
        " extra otel; empty: no traces)",
    )
    log_dir: str = setting("logs", "requests.jsonl and audit.jsonl go to <log-dir>/router/")
    request_log: float = setting(
        1.0,
        "share of requests that have a line in requests.jsonl, by their ids (0: none; of what failed, all"
        " have one where it is above 0)",
        at_least=0,
        at_most=1,
    )
    audit_log: str = setting(
        "on", "write a line for each change of adapters, servers and keys to audit.jsonl", choices=SWITCH
    )
    max_log_bytes: int = setting(
        64 * 2**20, "size at which such a file is moved to <name>.1 and begun anew (0: no bound)", at_least=0
    )
    log_level: str = setting("info", "least severe message that is logged", choices=LOG_LEVELS)

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = [instance.instance_id for instance in self.instances]
        for instance_id in ids:
            if ids.count(instance_id) > 1:
                raise ConfigError(f"two instances have the id {instance_id!r}; give one of them another id")
        _check_perf_model(self.perf_model)

    @property
    def asks_for_keys(self) -> bool:
        return bool(self.api_key or self.tenants_file)

    def with_keys(self) -> "RouterConfig":
        """With the keys read from where they stand. Raises ConfigError."""
        upstream = {"name": "upstream_api_key", "variable": UPSTREAM_KEY_VARIABLE}
        return replace(
            self,
            api_key=read_api_key(self.api_key, self.api_key_file),
            upstream_api_key=read_api_key(self.upstream_api_key, self.upstream_api_key_file, **upstream),
        )


def _host_of(url: str) -> str:
    """Host and port of a server's URL, which is checked: it stands in requests and headers as it is."""
    wrong = ConfigError(f"instance url is {url[:200]!r}; it must be like http://host:8080")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise wrong from error
    if parts.scheme not in ("http", "https") or not _is_host(host) or not _URL.fullmatch(url):
        raise wrong
    if parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"instance url is {url[:200]!r}; it must have no query, fragment or credentials")
    host = f"[{host}]" if ":" in host else host
    return host if port is None else f"{host}:{port}"


def _is_host(host: str) -> bool:
    """An address, or a name that can be looked up: of at most 253 characters, with 1 to 63 letters, digits,
    hyphens or underscores between dots."""
    with suppress(ValueError):
        ip_address(host)
        return True
    return len(host) <= 253 and all(map(_NAME.fullmatch, host.removesuffix(".").split(".")))


def _check_perf_model(spec: str) -> None:
    try:
        load_perf_model(spec)
    except ValueError as error:
        raise ConfigError(str(error)) from error
