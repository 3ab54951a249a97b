"""The Serve application: `build` makes it from settings, as `toppings up` and a Serve configuration do."""

import asyncio
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from toppings.access import with_api_key
from toppings.cluster.perf_model import load_perf_model
from toppings.cluster.ray_serve.client import FleetAdmin, ReplicaClient
from toppings.cluster.ray_serve.network import keep_replica_on_loopback
from toppings.cluster.ray_serve.node_registry import open_node_registry
from toppings.cluster.ray_serve.replica import EngineReplica, start_logging
from toppings.cluster.ray_serve.reports import describe
from toppings.cluster.ray_serve.request_ids import OneRequestId
from toppings.cluster.ray_serve.settings import BY_DEMAND, FleetConfig, UpConfig
from toppings.config import Config, ConfigError, EngineConfig
from toppings.server.app import create_app
from toppings.server.errors import json_response
from toppings.server.lifecycle import run_dir
from toppings.server.records import keeping_records
from toppings.tenants.book import TenantBook
from toppings.text import TextModel

ROUTER = "toppings.cluster.ray_serve.request_router:PolicyRouter"
SCALING = "toppings.cluster.ray_serve.scaling:by_demand"
HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
FRONT_CPUS = 1.0
UNBOUNDED = 1_000_000
"""Requests that Serve lets through to the front, which itself answers 429 where too many wait."""
HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 5.0
"""After three such in a row Serve ends a replica and starts another."""
STOP_POLL_S = 0.2

router = APIRouter()


@router.get("/replicas")
async def list_replicas(request: Request) -> Response:
    """The replicas that answer: how busy each is, and which adapters it has on its device."""
    replicas: ReplicaClient = request.app.state.replicas
    return json_response({"replicas": [describe(report) for report in await replicas.reports()]})


class Front:
    """The server's application over all replicas. There is one: it knows of every request and adapter."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, config: Config, fleet: FleetConfig, engines: DeploymentHandle
    ) -> None:
        """Returns when a replica is ready to serve."""
        from toppings.engine.base import model_path

        start_logging(config)
        keep_replica_on_loopback()
        _check_clients_are_seen(config)
        registry = await asyncio.to_thread(open_node_registry, config, is_front=True)
        text = await asyncio.to_thread(TextModel.load, model_path(config.engine))
        replicas = ReplicaClient(
            engines,
            registry,
            accept_timeout_s=fleet.accept_timeout_s,
            replica_timeout_s=fleet.replica_timeout_s,
        )
        await replicas.start()
        self._http = create_app(
            replicas, registry, text, config, make_admin=lambda state: FleetAdmin(state, replicas)
        )
        self._http.state.replicas = replicas
        self._http.include_router(router)
        self._http.add_middleware(OneRequestId)
        self._records = keeping_records(self._http, config, run_dir(config))
        self._records.__enter__()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._http

    def __del__(self) -> None:
        """Serve calls it when it stops the front, or could not start it."""
        if hasattr(self, "_records"):
            self._records.__exit__(None, None, None)


def build(args: dict[str, Any]) -> Application:
    """The application of a Serve configuration's `args`, which are the settings of `toppings up`.

    The API key is read on the machine that builds it. Raises ConfigError.
    """
    for name in ("host", "port", "ray_address", "app_name", "route_prefix"):
        if name in args:
            raise ConfigError(
                f"{name} is not for args: it is Serve's own, beside the application's import_path"
            )
    return make_app(UpConfig.from_settings(args).with_cores(None))


def make_app(config: UpConfig) -> Application:
    """Raises ConfigError for a key or a tenants file that cannot be read."""
    server, fleet = _with_whole_paths(with_api_key(config.server)), config.fleet
    stop = {
        "graceful_shutdown_timeout_s": server.server.shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": STOP_POLL_S,
        "logging_config": serve_logging(server),
    }
    engines = serve.deployment(EngineReplica).options(
        name="Engine",
        ray_actor_options=_resources(server.engine, fleet),
        max_ongoing_requests=UNBOUNDED,
        request_router_config=_routing(server.engine, fleet),
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        max_constructor_retry_count=fleet.most,
        **_scaling(server.engine, fleet),
        **stop,
    )
    front = serve.deployment(serve.ingress()(Front)).options(
        name="Front",
        num_replicas=1,
        ray_actor_options={"num_cpus": FRONT_CPUS},
        max_ongoing_requests=UNBOUNDED,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        **stop,
    )
    return front.bind(server, fleet, engines.bind(server))


def _with_whole_paths(config: Config) -> Config:
    """The front, which reads the tenants file, and the replicas start in a directory of Ray's: what they
    would look for, or write, there is where whoever builds the application means it to be."""
    path, logs = config.server.tenants_file, config.server.log_dir
    TenantBook(path)  # a mistake in it is told before engines start
    tenants = path and str(Path(path).absolute())
    server = replace(config.server, tenants_file=tenants, log_dir=str(Path(logs).absolute()))
    return replace(config, server=server)


def _check_clients_are_seen(config: Config) -> None:
    """Raises ConfigError: behind HAProxy everybody seems to be on this machine, and could load adapters."""
    if os.environ.get(HAPROXY_VARIABLE) == "1" and not config.server.asks_for_keys:
        raise ConfigError(f"{HAPROXY_VARIABLE} hides clients' addresses; set an api_key or a tenants_file")


def serve_logging(config: Config) -> dict[str, Any]:
    """Serve's own tales are for who debugs."""
    is_debug = config.server.log_level == "debug"
    return {"log_level": "DEBUG" if is_debug else "WARNING", "enable_access_log": is_debug}


def _resources(engine: EngineConfig, fleet: FleetConfig) -> dict[str, float]:
    gpus = fleet.gpus_per_replica or float(engine.device == "cuda")
    return {"num_cpus": fleet.cpus_per_replica, "num_gpus": gpus}


def _scaling(engine: EngineConfig, fleet: FleetConfig) -> dict[str, Any]:
    if not fleet.max_replicas:
        return {"num_replicas": fleet.replicas}
    policy = {"policy": {"policy_function": SCALING}} if fleet.scale_by == BY_DEMAND else {}
    return {
        "autoscaling_config": {
            "min_replicas": fleet.fewest,
            "initial_replicas": fleet.replicas,
            "max_replicas": fleet.max_replicas,
            "target_ongoing_requests": fleet.target_ongoing_requests or max(1.0, engine.max_num_seqs / 2),
            "upscale_delay_s": fleet.upscale_delay_s,
            "downscale_delay_s": fleet.downscale_delay_s,
            **policy,
        }
    }


def _routing(engine: EngineConfig, fleet: FleetConfig) -> dict[str, Any]:
    """The performance model travels by value: the other machines need not have its file."""
    return {
        "request_router_class": ROUTER,
        "request_router_kwargs": {
            "policy": fleet.policy,
            "perf_model": load_perf_model(fleet.perf_model).to_json(),
            **{
                name: None if getattr(fleet, name) == math.inf else getattr(fleet, name)
                for name in ("slo_tpt_ms", "slo_ttft_ms")
            },
            **{name: getattr(fleet, name) for name in ("placement", "num_copies", "placement_interval_s")},
            "sizes_fleet": fleet.scale_by == BY_DEMAND,
            "seed": engine.seed,
        },
        "request_routing_stats_period_s": fleet.stats_period_s,
    }
