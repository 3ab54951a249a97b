"""The Kubernetes example serves our own application, with settings that load here and pods that fit."""

import importlib
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from toppings.cluster.ray_serve.settings import UpConfig
from toppings.config import ConfigError, ServerConfig

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword:DeprecationWarning")  # of Ray itself

ROOT = Path(__file__).parents[3]
SERVICE: dict[str, Any] = yaml.safe_load((ROOT / "examples/kuberay.yaml").read_text())["spec"]
CLUSTER: dict[str, Any] = SERVICE["rayClusterConfig"]
[WORKERS] = CLUSTER["workerGroupSpecs"]


def application() -> Any:
    from ray.serve.schema import ServeDeploySchema

    [found] = ServeDeploySchema(**yaml.safe_load(SERVICE["serveConfigV2"])).applications
    return found


def container(group: dict[str, Any]) -> dict[str, Any]:
    [found] = group["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def test_its_import_path_builds_the_application_from_its_args(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.build_app import build_app

    monkeypatch.setenv("TOPPINGS_API_KEY", "secret")
    module, _, name = application().import_path.partition(":")
    built = getattr(importlib.import_module(module), name)(application().args)
    deployments = {each.name: each for each in build_app(built, name="toppings").deployments}
    assert set(deployments) == {"Engine", "Front"}
    scaling = deployments["Engine"]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (2, 2, 4)
    server, _, _ = deployments["Front"].init_args
    assert server.server.api_key == "secret"


def test_the_front_asks_for_the_key_of_a_file_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`toppings up` makes its application in the same way."""
    monkeypatch.delenv("TOPPINGS_API_KEY", raising=False)
    (tmp_path / "key").write_text("of-the-file\n")
    assert _front({"api_key_file": str(tmp_path / "key")}).api_key == "of-the-file"
    assert _front({}).api_key == ""
    monkeypatch.setenv("TOPPINGS_API_KEY", "of-the-variable")
    assert _front({}).api_key == "of-the-variable"


def test_the_front_reads_the_tenants_wherever_it_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tenants.yaml").write_text("tenants: {a: }")
    assert _front({"tenants_file": "tenants.yaml"}).tenants_file == str(tmp_path / "tenants.yaml")
    assert _front({}).tenants_file == ""
    assert _front({"log_dir": "mine"}).log_dir == str(tmp_path / "mine")
    (tmp_path / "tenants.yaml").write_text("tenants: {a: {what: 1}}")
    with pytest.raises(ConfigError, match="tenant a: unknown setting 'what'"):
        _front({"tenants_file": "tenants.yaml"})


def _front(settings: dict[str, str]) -> ServerConfig:
    from ray.serve._private.build_app import build_app

    from toppings.cluster.ray_serve.app import make_app

    built = build_app(make_app(UpConfig.from_settings(settings)), name="toppings")
    [front] = [each for each in built.deployments if each.name == "Front"]
    server: ServerConfig = front.init_args[0].server
    return server


def test_a_pod_of_each_group_has_room_for_what_runs_there() -> None:
    config = UpConfig.from_settings(application().args)
    limits = container(WORKERS)["resources"]["limits"]
    assert int(limits["cpu"]) >= config.fleet.cpus_per_replica
    assert int(limits["nvidia.com/gpu"]) >= 1
    assert (WORKERS["minReplicas"], WORKERS["maxReplicas"]) == (config.fleet.fewest, config.fleet.most)
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "1"


def test_all_pods_have_one_image_and_a_ray_that_we_work_with() -> None:
    assert container(CLUSTER["headGroupSpec"])["image"] == container(WORKERS)["image"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = map(Requirement, project["optional-dependencies"]["ray"])
    [ray] = [need for need in needs if need.name == "ray"]
    assert ray.specifier.contains(CLUSTER["rayVersion"])


def test_every_path_of_the_settings_is_on_the_volume_that_all_pods_mount() -> None:
    for group in (CLUSTER["headGroupSpec"], WORKERS):
        [mount] = container(group)["volumeMounts"]
        for name in ("model", "adapters"):
            assert application().args[name].startswith(f"{mount['mountPath']}/")
