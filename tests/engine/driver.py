"""Runs an engine by hand, in the test's own thread."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import PATIENCE_S
from toppings.adapters.link import EmulatedLink
from toppings.assist.pool import Ticket, Worker
from toppings.config import EngineConfig
from toppings.core import FinishReason
from toppings.engine.base import open_registry
from toppings.engine.build import build_engine
from toppings.engine.engine import Engine
from toppings.engine.graphs import GraphBackend
from toppings.messages import AddRequest, RequestOutput
from toppings.sampling_params import SamplingParams

LIMIT_S = 3 * PATIENCE_S
"""Of many requests; only one that never ends takes as long."""
HOLD_S = 30.0


def hold_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing lands over an emulated link before a CPU worker is asked for a product. (While
    an engine is built, its link is measured.)"""
    asked, prepare, wait = threading.Event(), Worker.prepare, EmulatedLink.wait_for_transfer

    def note(worker: Worker, *of_what: Any) -> Ticket | None:
        asked.set()
        return prepare(worker, *of_what)

    def hold(link: EmulatedLink, started_at: float, num_bytes: int) -> None:
        asked.wait(HOLD_S)
        wait(link, started_at, num_bytes)

    monkeypatch.setattr(Worker, "prepare", note)
    monkeypatch.setattr(EmulatedLink, "wait_for_transfer", hold)


class Driver:
    """An engine with its registry, and what came out of it so far."""

    def __init__(self, config: EngineConfig, graphs: GraphBackend | None = None) -> None:
        self.config = config
        self.registry = open_registry(config)
        self.engine: Engine = build_engine(config, graphs=graphs)
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, RequestOutput] = {}
        self.first: dict[str, RequestOutput] = {}

    def add(
        self, name: str, prompt: list[int], num_tokens: int, adapter: str | None = None, **sampling: Any
    ) -> None:
        params = SamplingParams(
            **{"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True, **sampling}
        )
        self.add_by_id(
            name, prompt, params, None if adapter is None else self.registry.get(adapter).adapter_id
        )

    def add_all(self, prompts: dict[str, list[int]], turn: str, num_tokens: int) -> None:
        """One request for each adapter, of its prompt."""
        for name, prompt in prompts.items():
            self.add(f"{name} {turn}", prompt, num_tokens, name)

    def add_by_id(
        self, name: str, prompt: list[int], params: SamplingParams, adapter_id: int | None, **more: Any
    ) -> None:
        refusal = self.engine.add(AddRequest(name, prompt, params, adapter_id, **more))
        self.tokens[name] = []
        if refusal is not None:
            self._note(refusal)

    def step(self) -> list[RequestOutput]:
        outputs = self.engine.step()
        for output in outputs:
            self._note(output)
        return outputs

    def run(self) -> dict[str, list[int]]:
        """Steps until every request has ended; tokens by request."""
        stop_at = time.monotonic() + LIMIT_S
        while self.engine.has_requests:
            if not self.step():
                time.sleep(0.001)
            assert time.monotonic() < stop_at, "requests do not end"
        self.engine.check_integrity()
        return self.tokens

    def errors(self) -> dict[str, str | None]:
        return {name: o.error for name, o in self.last.items() if o.finish_reason is FinishReason.ERROR}

    def close(self) -> None:
        self.engine.close()
        self.registry.close()

    def _note(self, output: RequestOutput) -> None:
        assert output.request_id not in self.last, "a request was answered after its end"
        self.tokens[output.request_id] += output.token_ids
        self.first.setdefault(output.request_id, output)
        if output.finish_reason is not None:
            self.last[output.request_id] = output


@contextmanager
def drive(model: Path, state_dir: Path, adapters: dict[str, Path], **settings: Any) -> Iterator[Driver]:
    """An engine in fp32 over `model` with `adapters` registered; one thread, for the model is tiny. `graphs`
    among the settings: how decode steps are captured."""
    graphs: GraphBackend | None = settings.pop("graphs", None)
    defaults = {
        "dtype": "float32",
        "num_threads": 1,
        "kv_cache_bytes": 8 * 2**20,
        "device_pool_bytes": 32 * 2**20,
    }
    config = EngineConfig(model=str(model), state_dir=str(state_dir), **{**defaults, **settings})
    registry = open_registry(config)
    for name, path in adapters.items():
        registry.register(name, path, replace=True)
    registry.close()
    driver = Driver(config, graphs)
    try:
        yield driver
    finally:
        driver.close()
