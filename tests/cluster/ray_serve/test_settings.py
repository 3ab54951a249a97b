import math
from pathlib import Path

import pytest

from toppings.cluster.ray_serve.settings import FleetConfig, UpConfig
from toppings.config import Config, ConfigError


def test_settings_are_one_flat_list() -> None:
    config = UpConfig.from_settings({"replicas": "3", "max_num_seqs": 8, "port": 0, "slo_tpt_ms": 40})
    assert (config.fleet.replicas, config.fleet.slo_tpt_ms) == (3, 40.0)
    assert (config.server.engine.max_num_seqs, config.server.server.port) == (8, 0)


def test_no_setting_of_a_fleet_hides_one_of_a_server() -> None:
    own, theirs = set(UpConfig().to_settings()), set(Config().to_settings())
    assert len(own) == len(theirs) + len(FleetConfig.__dataclass_fields__)


def test_what_is_written_reads_back_the_same() -> None:
    given = {"replicas": 2, "max_replicas": 4, "policy": "dlora", "mode": "pipelined"}
    config = UpConfig.from_settings(given)
    assert UpConfig.from_settings(config.to_settings()) == config


def test_yaml_is_read_and_options_override_it(tmp_path: Path) -> None:
    path = tmp_path / "up.yaml"
    path.write_text("replicas: 2\nmax-replicas: 6\ntarget_ongoing_requests: 12\nkv_cache_bytes: 64MiB\n")
    config = UpConfig.from_settings({"replicas": 3}, UpConfig.from_yaml(path))
    assert (config.fleet.replicas, config.fleet.fewest, config.fleet.most) == (3, 3, 6)
    assert config.fleet.target_ongoing_requests == 12.0
    assert config.server.engine.kv_cache_bytes == 64 * 2**20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replica": 2}, "unknown setting 'replica'; did you mean replicas"),
        ({"replicas": 0}, "replicas is 0"),
        ({"replicas": "two"}, "replicas is 'two'"),
        ({"min_replicas": 1}, "min_replicas needs max_replicas"),
        ({"replicas": 5, "max_replicas": 4}, "5, 5 and 4"),
        ({"replicas": 2, "min_replicas": 3, "max_replicas": 4}, "3, 2 and 4"),
        ({"scale_by": "demand"}, "scale_by demand needs max_replicas"),
        (
            {"scale_by": "demand", "max_replicas": 4, "target_ongoing_requests": 8},
            "target_ongoing_requests is 8",
        ),
        ({"policy": "best"}, "policy is 'best'; choose one of rank_aware"),
        ({"slo_tpt_ms": 0}, "slo_tpt_ms is 0"),
        ({"gpus_per_replica": -1}, "gpus_per_replica is -1"),
        ({"route_prefix": "x"}, "route_prefix is 'x'"),
        ({"perf_model": "nosuch"}, "cannot read performance model 'nosuch'"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UpConfig.from_settings(settings)


@pytest.mark.parametrize(
    ("settings", "num_cores", "cpus", "threads"),
    [
        ({"replicas": 2}, 16, 8.0, 8),
        ({"replicas": 4}, 2, 0.5, 1),
        ({"replicas": 1, "max_replicas": 4}, 16, 4.0, 4),
        ({"replicas": 2, "num_threads": 3}, 16, 8.0, 3),
        ({"replicas": 2, "cpus_per_replica": 2}, 16, 2.0, 2),
        ({"replicas": 2}, None, 1.0, 1),
        ({"replicas": 2, "cpus_per_replica": 6}, None, 6.0, 6),
    ],
)
def test_engines_share_the_cores_of_a_machine(
    settings: dict[str, object], num_cores: int | None, cpus: float, threads: int
) -> None:
    config = UpConfig.from_settings(settings).with_cores(num_cores)
    assert (config.fleet.cpus_per_replica, config.server.engine.num_threads) == (cpus, threads)


def test_without_an_objective_there_is_none() -> None:
    assert FleetConfig().slo_tpt_ms == math.inf
