"""What `deploy/` holds, against what servers and routers are: settings, probes, ports, keys and jobs."""

import configparser
import re
from collections.abc import Collection
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from tests.server.conftest import Server
from toppings.access import KEY_VARIABLE
from toppings.cluster.router.app import SHUTDOWN_S, running_router
from toppings.cluster.router.guard import OPEN_PATHS as ROUTER_OPEN_PATHS
from toppings.cluster.router.settings import InstanceConfig, RouterConfig
from toppings.command import USER_ERROR
from toppings.config import Config
from toppings.server.auth import OPEN_PATHS
from toppings.stop import LAST_RESORT_S

DEPLOY = Path(__file__).parents[2] / "deploy"
KEY = "the-one"


@pytest.fixture
def settings() -> dict[str, object]:
    return {"api_key": KEY}


def read_all(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


SERVER_END_S = Config().server.shutdown_timeout_s + LAST_RESORT_S
ROUTER_END_S = SHUTDOWN_S + LAST_RESORT_S


@pytest.mark.parametrize(
    ("name", "known", "orderly_s"),
    [
        ("toppings.service", set(Config().to_settings()), SERVER_END_S),
        ("toppings-router.service", set(RouterConfig().to_settings()), ROUTER_END_S),
    ],
    ids=["server", "router"],
)
def test_a_unit_names_what_is_there(name: str, known: set[str], orderly_s: float) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.read(DEPLOY / name)
    service = unit["Service"]
    options = set(re.findall(r"--([a-z-]+)", service["ExecStart"])) - {"config"}
    assert {option.replace("-", "_") for option in options} <= known
    assert float(service["TimeoutStopSec"]) > orderly_s
    assert service["RestartPreventExitStatus"] == str(USER_ERROR)


@pytest.mark.parametrize(
    ("name", "open_paths", "orderly_s", "port"),
    [
        ("kubernetes.yaml", OPEN_PATHS, SERVER_END_S, Config().server.port),
        ("kubernetes-router.yaml", ROUTER_OPEN_PATHS, ROUTER_END_S, RouterConfig().port),
    ],
    ids=["server", "router"],
)
def test_probes_name_what_is_there(
    name: str, open_paths: Collection[str], orderly_s: float, port: int
) -> None:
    deployment, service = read_all(name)[-2:]
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    probes = [container[probe] for probe in ("startupProbe", "readinessProbe") if probe in container]
    assert {probe["httpGet"]["path"] for probe in probes} == {"/ready"}
    assert "/ready" in open_paths
    assert pod["terminationGracePeriodSeconds"] > orderly_s
    assert container["ports"][0]["containerPort"] == port
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_a_routers_settings_in_kubernetes_are_such(tmp_path: Path) -> None:
    settings, deployment, _ = read_all("kubernetes-router.yaml")
    path = tmp_path / "router.yaml"
    path.write_text(settings["data"]["router.yaml"])
    config = RouterConfig.from_yaml(path)
    assert [each.instance_id for each in config.instances] == ["a", "b"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    mounts = tuple(each["mountPath"] for each in container["volumeMounts"])
    assert config.state_file.startswith(mounts)
    assert config.log_dir.startswith(mounts)


async def test_prometheus_is_let_in_by_servers_and_routers(server: Server, url: str) -> None:
    """As each job is written there, with a key in its file; without one it is not."""
    [prometheus] = read_all("prometheus.yml")
    jobs = {job["job_name"]: job for job in prometheus["scrape_configs"]}
    targets = {name: job["static_configs"][0]["targets"] for name, job in jobs.items()}
    ports = {name: [int(target.rpartition(":")[2]) for target in told] for name, told in targets.items()}
    assert ports == {"toppings": [Config().server.port], "toppings-router": [RouterConfig().port]}
    assert all((DEPLOY / name).is_file() for name in prometheus["rule_files"])
    answers = {}
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        config = RouterConfig(instances=(InstanceConfig(url=url, instance_id="s0"),), port=0, api_key=KEY)
        _, router_url = await stack.enter_async_context(running_router(config))
        for name, base in {"toppings": url, "toppings-router": router_url}.items():
            path, authorization = jobs[name].get("metrics_path", "/metrics"), jobs[name]["authorization"]
            assert Path(authorization["credentials_file"]).is_absolute()
            header = {"Authorization": f"{authorization.get('type', 'Bearer')} {KEY}"}
            for headers in ({}, header):
                async with session.get(base + path, headers=headers) as reply:
                    answers[name, bool(headers)] = reply.status, (await reply.text())[:6]
    let_in, refused = (200, "# HELP"), (401, '{"erro')
    assert answers == {(name, has): let_in if has else refused for name in jobs for has in (False, True)}


def test_rules_and_the_dashboard_ask_for_jobs_that_there_are() -> None:
    [prometheus], monitors = read_all("prometheus.yml"), read_all("servicemonitor.yaml")
    jobs = {job["job_name"] for job in prometheus["scrape_configs"]}
    asked = re.findall(r'job=~?"([^"]*)"', (DEPLOY / "alerts.yaml").read_text())
    assert asked
    assert {job for job in jobs if any(re.fullmatch(pattern, job) for pattern in asked)} == jobs
    for file, monitor in zip(("kubernetes.yaml", "kubernetes-router.yaml"), monitors, strict=True):
        deployment, service = read_all(file)[-2:]
        assert service["metadata"]["name"] in jobs  # the job of what the operator finds
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        [endpoint] = monitor["spec"]["endpoints"]
        [container] = deployment["spec"]["template"]["spec"]["containers"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        environment = {each["name"]: each for each in container["env"]}
        key = environment[KEY_VARIABLE]["valueFrom"]["secretKeyRef"]
        assert endpoint["authorization"]["credentials"] == key
    sources, boards = read_all("grafana-provisioning.yaml")
    assert [each["type"] for each in sources["datasources"]] == ["prometheus"]
    assert boards["providers"][0]["options"]["path"]


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_an_image_is_healthy_while_it_is_ready(name: str) -> None:
    text = (DEPLOY.parent / "docker" / name).read_text()
    found = re.search(r"HEALTHCHECK [^\[]*CMD \[.*urlopen\('http://127\.0\.0\.1:(\d+)(/\w+)'", text)
    assert found is not None
    assert found[2] == "/ready"
    assert found[2] in OPEN_PATHS
    assert f'"--port", "{found[1]}"' in text
    assert f"EXPOSE {found[1]}" in text
