"""One engine as a Serve replica: its process, its adapters, and what it tells of itself."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray import serve

from toppings.adapters.errors import AdapterError
from toppings.adapters.registry import AdapterRegistry
from toppings.bad_input import RequestError
from toppings.cluster.measured import read_perf_model
from toppings.cluster.perf_model import PerfModel
from toppings.cluster.ray_serve.messages import (
    SIGN_OF_LIFE,
    SIGN_PERIOD_S,
    Ack,
    AdapterRef,
    Call,
    ReplicaReport,
)
from toppings.cluster.ray_serve.network import keep_replica_on_loopback
from toppings.cluster.ray_serve.node_registry import ReplicaAdapters, explain, open_node_registry
from toppings.cluster.ray_serve.pacing import paced, with_signs_of_life
from toppings.cluster.ray_serve.scaling import Wanted
from toppings.cluster.report import RequestEntry
from toppings.config import OFF, Config, EngineConfig
from toppings.core import FinishReason
from toppings.engine.client import EngineClient
from toppings.engine.process import EngineLog
from toppings.exchanges.log_lines import NamingFormatter
from toppings.log_files import LOG_FORMAT
from toppings.messages import EngineReady, RequestOutput
from toppings.server.exchange import Exchange, current_exchange
from toppings.server.report import make_report

logger = logging.getLogger(__name__)

MAX_MESSAGES_PER_S = 400.0
"""Of one replica to the front; one costs each of them about half a millisecond of a core."""
LAST_WORDS_S = 0.5
"""How long a replica whose engine has died goes on, so that its callers hear why."""


class EngineReplica:
    """Serve makes one per replica; its methods are called by the front, the router's controller and Serve."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc] # Serve awaits it
        """Returns when the engine is ready. Raises EngineStartError, ValueError or OSError."""
        start_logging(config)
        keep_replica_on_loopback()
        self._id = serve.get_replica_context().replica_id.unique_id
        self._requests: dict[str, RequestEntry] = {}
        self._wanted = Wanted()
        engine = replace(config.engine, step_log=_step_log(config, self._id))
        registering = asyncio.create_task(asyncio.to_thread(open_node_registry, config, is_front=False))
        self._client = await EngineClient.start(
            engine, after=registering, log=EngineLog(config.server.log_level)
        )
        registry = registering.result()
        self._adapters = ReplicaAdapters(registry, self._client, config.server)
        self._perf_model = _measured_model(config.engine, registry)
        self._watch = asyncio.create_task(self._end_with_engine())

    # --- requests ---

    async def generate(self, call: Call) -> AsyncGenerator[str | RequestOutput, None]:
        """First this replica's id, which says that it has taken the request; then the engine's outputs, and
        `SIGN_OF_LIFE` while there are none.

        Closing it aborts the request. Raises EngineDeadError.
        """
        if call.http_id:  # in a task of Serve's own, whose lines of the log name it
            current_exchange.set(Exchange(call.http_id))
        adapter = call.adapter
        name, rank = (adapter.name, adapter.rank) if adapter else (None, 0)
        entry = RequestEntry(call.request_id, name, rank, len(call.prompt_token_ids), 0)
        self._requests[call.request_id] = entry
        try:
            yield self._id
            adapter_id = await self._adapters.resolve(adapter) if adapter else None
            outputs = self._client.generate(
                call.prompt_token_ids,
                call.sampling,
                adapter_id,
                cache_salt=call.cache_salt,
                standing=call.standing,
            )
            paced_outputs = paced(outputs, self._period_s)
            async with aclosing(with_signs_of_life(paced_outputs, SIGN_PERIOD_S)) as messages:
                async for message in messages:
                    if message is None:
                        yield SIGN_OF_LIFE
                        continue
                    entry.num_generated += len(message.token_ids)
                    yield message
        except AdapterError as error:
            text = explain(error, self._id)
            yield RequestOutput(call.request_id, [], finish_reason=FinishReason.ERROR, error=text)
        finally:
            del self._requests[call.request_id]

    def _period_s(self) -> float:
        return len(self._requests) / MAX_MESSAGES_PER_S

    # --- administration, by broadcast ---

    async def adopt(self, ref: AdapterRef) -> Ack:
        """Make sure that the adapter is here."""
        try:
            await self._adapters.resolve(ref)
        except AdapterError as error:
            return Ack(self._id, str(error))
        return Ack(self._id)

    async def retire(self, ref: AdapterRef) -> Ack:
        await self._adapters.retire(ref)
        return Ack(self._id)

    async def purge(self, ref: AdapterRef) -> Ack:
        await self._adapters.purge(ref)
        return Ack(self._id)

    async def pin(self, ref: AdapterRef, is_pinned: bool) -> Ack:
        try:
            await self._adapters.pin(ref, is_pinned)
        except (AdapterError, RequestError) as error:
            return Ack(self._id, str(error))
        return Ack(self._id)

    async def prefetch(self, ref: AdapterRef) -> Ack:
        try:
            await self._adapters.prefetch(ref)
        except (AdapterError, RequestError) as error:
            return Ack(self._id, str(error))
        return Ack(self._id)

    async def read_ahead(self, homes: list[tuple[AdapterRef, list[str]]]) -> None:
        """Those that have a home here. What cannot be read is told by the request that names it."""
        for ref, replicas in homes:
            if self._id in replicas:
                with suppress(AdapterError, RequestError):
                    await self._adapters.prefetch(ref)

    async def want(self, num_replicas: int) -> None:
        """So many should there be of them; it tells Serve's controller, which no other way leads to."""
        self._wanted.note(num_replicas, time.monotonic())

    # --- what it tells ---

    async def info(self) -> EngineReady:
        return self._client.info

    async def report(self) -> ReplicaReport:
        stats = await self._client.stats()
        node_id = ray.get_runtime_context().get_node_id()
        adapters = [(self._adapters.name_of(each.adapter_id), each) for each in stats.adapters]
        return ReplicaReport(self._id, node_id, stats, adapters)

    async def record_routing_stats(self) -> dict[str, Any]:
        """For the request router; Serve asks for it every `stats_period_s`."""
        report = make_report(
            await self._client.stats(),
            self._client.info,
            self._adapters.name_of,
            self._perf_model,
            list(self._requests.values()),
        )
        told_plainly: dict[str, Any] = msgspec.to_builtins(report)
        return told_plainly

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For the autoscaling policy (`scaling.py`); Serve asks for it where there is autoscaling."""
        return self._wanted.stats(time.monotonic())

    # --- life ---

    async def check_health(self) -> None:
        """Raises where the engine does not answer; Serve then puts another replica in this one's place."""
        await self._client.stats()

    async def _end_with_engine(self) -> None:
        """Without its engine this process is of no use: Serve sees at once that it has gone."""
        try:
            await self._client.died.wait()
            logger.error("the engine of replica %s has died; the replica ends", self._id)
            await asyncio.sleep(LAST_WORDS_S)
        except asyncio.CancelledError:
            raise  # Serve stops the replica
        except BaseException:
            logger.exception("replica %s can no longer watch its engine and ends", self._id)
        os._exit(1)

    async def __del__(self) -> None:
        """Serve awaits it when it stops the replica, with no requests left, or could not start it."""
        if not hasattr(self, "_watch"):
            return
        self._watch.cancel()
        with suppress(asyncio.CancelledError):
            await self._watch
        await self._client.shutdown(0.0)


def start_logging(config: Config) -> None:
    """To standard error, which Ray keeps with its session's logs and shows to who started it."""
    handler = logging.StreamHandler()
    handler.setFormatter(NamingFormatter(LOG_FORMAT, current_exchange.get))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("toppings").setLevel(config.server.log_level.upper())


def _step_log(config: Config, replica_id: str) -> str:
    """A file of each replica's own."""
    if config.engine.step_log == OFF:
        return OFF
    if config.engine.step_log:
        return f"{config.engine.step_log}.{replica_id}"
    return str(Path(config.server.log_dir) / config.engine.mode / replica_id / "steps.jsonl")


def _measured_model(config: EngineConfig, registry: AdapterRegistry) -> PerfModel | None:
    """What was measured on this machine; None where nothing was, or nothing that can be read."""
    try:
        return read_perf_model("", config, registry)
    except ValueError as error:
        logger.warning("%s", error)
        return None
