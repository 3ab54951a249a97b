from collections.abc import Iterator

import pytest
import torch

from tests.assist.world import World, make_coordinator, pool_settings, worker_pool
from toppings.assist.coordinator import Coordinator
from toppings.assist.pool import WorkerPool


@pytest.fixture(scope="package", params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def shared_world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


@pytest.fixture(scope="package")
def workers(shared_world: World) -> Iterator[WorkerPool]:
    """Two workers that no test harms."""
    with worker_pool(pool_settings(shared_world, deadline_s=60.0)) as pool:
        yield pool


@pytest.fixture
def world(shared_world: World) -> World:
    shared_world.reset()
    return shared_world


@pytest.fixture
def coordinator(world: World, workers: WorkerPool) -> Coordinator:
    return make_coordinator(world, workers)
