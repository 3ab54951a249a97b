"""Where a Ray that is started here listens; Ray reads it when it is imported, so `bind_ray` comes first."""

import os
import sys
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import psutil

from toppings.config import ConfigError

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Where it is 0, as on desktops, a Ray's own address is the loopback's, and so all that it opens."""


def bind_ray(host: str) -> None:
    """Let a Ray that is started in this process, and all its processes, listen on `host`.

    Only the loopback can be had by itself: with any other address most of Ray's servers listen on all
    interfaces, and `host` is the one that they know each other by. Raises ConfigError.
    """
    if not is_loopback(host):
        os.environ.pop(LOOPBACK_VARIABLE, None)
        return
    if os.environ.setdefault(LOOPBACK_VARIABLE, "0") != "0":
        raise ConfigError(f"ray_host is {host}, but {LOOPBACK_VARIABLE} is set: unset it")
    constants = sys.modules.get("ray._private.ray_constants")
    if constants is not None and constants.ENABLE_RAY_CLUSTER:
        raise ConfigError(f"ray_host is {host}, but Ray was imported before it was known")


def keep_replica_on_loopback() -> None:
    """In a replica's process, before Serve opens its port for other deployments, which it opens to all.

    Where Ray itself listens on the loopback, that port does too: what it takes it unpickles, from anybody.
    """
    import ray
    from ray.serve._private import replica

    if not is_loopback(ray.util.get_node_ip_address()):
        return
    add_port = replica.add_port_to_grpc_server

    def add_local_port(server: Any, address: str) -> int:
        port: int = add_port(server, address.replace("[::]:", "127.0.0.1:"))
        return port

    replica.add_port_to_grpc_server = add_local_port


def is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@dataclass(frozen=True, slots=True, order=True)
class Listener:
    """A TCP address that a process of ours listens on."""

    host: str
    port: int
    process: str

    @property
    def is_open(self) -> bool:
        """Whether other machines may reach it."""
        return not is_loopback(self.host)

    def __str__(self) -> str:
        return f"{self.host}:{self.port} ({self.process})"


def listeners() -> list[Listener]:
    """Of this process and all it started, and what they started."""
    found: set[Listener] = set()
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(Listener(connection.laddr.ip, connection.laddr.port, process.name()))
        except psutil.Error:  # it has ended meanwhile
            continue
    return sorted(found)
