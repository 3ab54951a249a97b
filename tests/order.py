"""A pytest plugin: modules that take longest come first, so that none is left to one worker at the end."""

import pytest

LONGEST = (
    "tests/test_benchmarks.py",
    "tests/cluster/ray_serve/test_application.py",
    "tests/hostile/test_faults.py",
    "tests/hostile/test_requests.py",
    "tests/reproduce/test_cli.py",
    "tests/server/test_engine_loss.py",
    "tests/engine/test_cold_tokens.py",
    "tests/engine/test_engine_restart.py",
    "tests/ops/test_gpu_compile.py",
    "tests/engine/test_activated.py",
    "tests/cluster/test_mixed_fleet.py",
    "tests/cluster/test_router_process.py",
    "tests/cluster/test_stops.py",
    "tests/bench/test_modes.py",
    "tests/server/test_lifecycle.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    places = {config.rootpath / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
