"""Two servers behind a router, each a process tree of its own, and what goes wrong with any of them."""

import itertools
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self

from hostile.fault_plan import ENGINE_START_S, HELD_S, MODEL, Fault, half_open, server_stopped
from hostile.faults import kill, served_again, stopped, wait_for
from hostile.served import ENGINE, START_TIMEOUT_S, Program, Served, Usage
from toppings.lab.http.server import free_port

NUM_SERVERS = 2
STATUSES_OF_5XX = (502, 503, 504, 507)
"""A router may also say that a server's answer broke off, or that none came."""


class Router(Program):
    """`toppings route`; it remembers adapters below `folder`."""

    def __init__(self, folder: Path, urls: Sequence[str]) -> None:
        port = free_port()
        options = ("--instances", ",".join(urls), "--state-file", str(folder / "adapters.json"))
        super().__init__(folder, port, ("route", "--port", str(port), *options))


class Fleet:
    """A context. Faults of a server come to one after the other."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        self._folder = folder
        self._options = options
        self._turns = itertools.cycle(range(NUM_SERVERS))
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            begun = [Served(self._folder / f"server-{i}", *self._options) for i in range(NUM_SERVERS)]
            self.servers = [stack.enter_context(server) for server in begun]
            urls = [server.url for server in self.servers]
            self.router = stack.enter_context(Router(self._folder / "router", urls))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def settle(self) -> Usage:
        """What the router holds once nobody has a request left."""
        for server in self.servers:
            server.wait_until_idle()
        wait_for(lambda: not any(each["num_in_flight"] for each in self._instances()), 20.0, "it is idle")
        time.sleep(1.0)
        return self.router.usage()

    def _instances(self) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = self.router.ask("/instances")[1]["instances"]
        return rows

    def faults(self, patience_s: float) -> list[Fault]:
        """Those that leave the router in place; `patience_s`: until requests must be served again."""
        front = {"timeout_s": patience_s}
        return [
            Fault("server killed", partial(self._server_killed, patience_s)),
            Fault("server stopped", partial(self._server_stopped, patience_s)),
            Fault("engine of a server killed", partial(self._engine_killed, patience_s)),
            Fault("router stopped", partial(server_stopped, self.router, **front)),
            Fault("requests that never end", partial(half_open, self.router, **front)),
        ]

    def router_fault(self, patience_s: float) -> Fault:
        return Fault("router killed", partial(self._router_killed, patience_s), is_outage=True)

    def _server_killed(self, patience_s: float) -> float:
        server = self.servers[next(self._turns)]
        server.kill()
        seconds = self._served_again(patience_s)
        server.start()
        server.wait_until_ready(START_TIMEOUT_S)
        self._wait_for_all(patience_s)
        return seconds

    def _server_stopped(self, patience_s: float) -> float:
        """All its processes, as where a machine hangs."""
        with stopped(*self.servers[next(self._turns)].tree()):
            seconds = self._served_again(patience_s)
            time.sleep(2 * HELD_S)
        self._wait_for_all(patience_s + ENGINE_START_S)
        return seconds

    def _engine_killed(self, patience_s: float) -> float:
        server = self.servers[next(self._turns)]
        engine = server.find(ENGINE)
        assert engine is not None
        kill(engine)
        seconds = self._served_again(patience_s)
        server.wait_until_ready(patience_s + ENGINE_START_S)
        self._wait_for_all(patience_s)
        return seconds

    def _router_killed(self, patience_s: float) -> float:
        started_at = time.perf_counter()
        self.router.kill()
        self.router.start()
        self.router.wait_until_ready(START_TIMEOUT_S)
        served_again(self.router, MODEL, patience_s)
        seconds = time.perf_counter() - started_at
        self._wait_for_all(patience_s)
        return seconds

    def _served_again(self, patience_s: float) -> float:
        """The longest of some requests: a router learns of a fault from the first ones."""
        return max(served_again(self.router, model, patience_s) for model in (MODEL, "cook", "haiku", ""))

    def _wait_for_all(self, timeout_s: float) -> None:
        wait_for(lambda: all(each["is_alive"] for each in self._instances()), timeout_s, "all servers are up")
