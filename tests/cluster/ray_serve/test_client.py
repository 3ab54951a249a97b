"""The client of all replicas, without any."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.waiting import until
from toppings.cluster.ray_serve.client import ReplicaClient
from toppings.cluster.ray_serve.messages import AdapterRef


async def test_homes_that_come_while_others_are_told_are_told_next(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Any = SimpleNamespace(get=str)
    client = ReplicaClient(cast("Any", None), registry, accept_timeout_s=1.0, replica_timeout_s=1.0)
    told, may_go = [], asyncio.Event()

    async def broadcast(method: str, homes: Any, *, timeout_s: float) -> list[Any]:
        told.append(homes)
        await may_go.wait()
        return []

    monkeypatch.setattr(client, "_broadcast", broadcast)
    monkeypatch.setattr(AdapterRef, "of", lambda record: record)
    client._start_reading({"x": ["a"]})
    await until(lambda: told)
    client._start_reading({"x": ["b"], "y": ["a"]})
    client._start_reading({"y": ["b", "a"]})
    may_go.set()
    await until(lambda: len(told) == 2)
    assert told == [[("x", ["a"])], [("y", ["b", "a"]), ("x", ["b"])]]
