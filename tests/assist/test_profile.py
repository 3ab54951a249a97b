"""A profile finds the machine's constants again, and survives its file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.assist.world import NUM_LAYERS, PROFILE, SIZES, World, pool_settings, worker_pool
from tests.streams import Device
from toppings.adapters.layout import BaseShapes
from toppings.adapters.loader import CpuLoader
from toppings.assist.cost import CostProfile, CpuCost
from toppings.assist.profile import EngineProbes, LinkProbe, ProbeLora, measure
from toppings.config import EngineConfig
from toppings.engine import assist

SHAPES = BaseShapes(4, (((1024, 1024),) * 4) + (((1024, 2816),) * 2) + ((2816, 1024),))
TRUTH = CpuCost(fixed_ms=0.08, per_gflop_ms=12.0, per_mweights_ms=0.3, per_mvalues_ms=0.9)


class FakeMachine:
    """A machine that is exactly as the model says."""

    def copy_s(self, num_bytes: int) -> float:
        return 5e-6 + num_bytes / 4e9

    def slice_s(self, num_rows: int, rank: int, num_in: int, num_out: int) -> float:
        return TRUTH.ms(num_rows, rank, num_in, num_out) * 1e-3

    def wake_s(self) -> float:
        return 70e-6

    def layer_s(self, num_tokens: int) -> tuple[float, float]:
        layer_s = max(1e-3, num_tokens * 2e-5)
        return layer_s, 0.75 * layer_s

    def slowdown(self, num_tokens: int) -> float:
        return 0.99  # measured a little below 1, as happens

    def queue_s(self) -> tuple[float, float]:
        return 150e-6, 80e-6


@pytest.fixture(scope="module")
def profile() -> CostProfile:
    return measure(FakeMachine(), SHAPES, num_workers=3, origin="a fake")


def test_the_link_is_found_again(profile: CostProfile) -> None:
    assert profile.link_gbps == pytest.approx(4.0)
    assert profile.copy_ms == pytest.approx(0.005)
    assert profile.result_gbps == 0.0


def test_results_that_leave_the_host_travel_as_weights_do() -> None:
    profile = measure(FakeMachine(), SHAPES, num_workers=3, origin="a fake", has_results_on_link=True)
    assert profile.result_gbps == pytest.approx(4.0)


def test_the_cpu_model_is_found_again(profile: CostProfile) -> None:
    assert profile.round_trip_ms == pytest.approx(TRUTH.fixed_ms)
    found = (profile.cpu.per_gflop_ms, profile.cpu.per_mweights_ms, profile.cpu.per_mvalues_ms)
    assert found == pytest.approx((12.0, 0.3, 0.9))


def test_the_rest_is_taken_as_measured(profile: CostProfile) -> None:
    assert profile.gemm_share == pytest.approx(0.75)
    assert profile.session_ms == pytest.approx(0.07)
    assert (profile.sharing_slowdown, profile.num_workers) == (1.0, 3)
    assert (profile.queue_layer_ms, profile.queue_piece_ms) == pytest.approx((0.15, 0.08))


@pytest.mark.parametrize(("num_tokens", "ms"), [(1, 1.0), (32, 1.0), (128, 2.56), (320, 6.4), (1024, 20.48)])
def test_layer_times_are_linear_between_and_beyond_what_was_measured(
    profile: CostProfile, num_tokens: int, ms: float
) -> None:
    assert profile.layer_time_ms(num_tokens) == pytest.approx(ms)


def test_a_profile_survives_its_file(profile: CostProfile) -> None:
    assert CostProfile.from_json(profile.to_json()) == profile


def test_a_file_is_replaced_whole_and_a_broken_one_is_named(profile: CostProfile, tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(profile.to_json()[:40])
    with pytest.raises(ValueError, match=f"{file}: not a cold-start profile"):
        CostProfile.read(file)
    profile.write(file)
    assert CostProfile.read(file) == profile
    assert list(tmp_path.iterdir()) == [file]


def test_other_cores_or_threads_have_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def path(num_threads: int, cores: tuple[int, ...]) -> Path:
        monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
        monkeypatch.setattr(assist, "available_cores", lambda: cores)
        return assist.profile_path(EngineConfig(), tmp_path)

    paths = [path(1, (0,)), path(1, (0, 1)), path(2, (0, 1)), path(2, (0, 1, 2, 3)), path(1, (0, 1, 2))]
    assert len(set(paths)) == len(paths)
    assert path(2, (0, 1)) == paths[2]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cpu": {}}'])
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a cold-start profile"):
        CostProfile.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [("link_gbps", 0.0), ("num_workers", -1), ("layer_ms", []), ("layer_ms", [[2, 1], [1, 1]])],
)
def test_values_out_of_range_are_refused(field: str, value: object) -> None:
    fields = {**json.loads(PROFILE.to_json()), field: value}
    with pytest.raises(ValueError, match=field):
        CostProfile.from_json(json.dumps(fields))


def test_a_real_pool_and_a_real_loader_can_be_measured() -> None:
    world = World(torch.float32)
    shapes = BaseShapes(NUM_LAYERS, SIZES)
    weight = torch.ones(96, 160)

    def forward(num_tokens: int, lora: ProbeLora) -> None:
        x = torch.ones(num_tokens, 96)
        for layer in range(NUM_LAYERS):
            for group in ("qkv", "o"):
                lora.start(layer, group, x)
                y = x @ weight
                lora.finish(layer, group, x, y)

    loader = CpuLoader(world.pool.arena, link_gbps=0.5)
    try:
        link = LinkProbe(loader, world.pool, shapes, world.host.view)
        with worker_pool(pool_settings(world, num_workers=1)) as workers:
            probes = EngineProbes(workers, forward, link, shapes, torch.float32)
            found = measure(probes, shapes, num_workers=1, origin="this machine", max_tokens=64)
    finally:
        loader.close()
    for num_bytes in (1 << 16, 1 << 21):  # a busy machine adds to the link's time, and nothing takes from it
        assert found.copy_ms * 1e-3 + num_bytes / (found.link_gbps * 1e9) > num_bytes / 0.5e9 * 0.99
    assert [tokens for tokens, _ in found.layer_ms] == [1, 32, 64]
    assert found.cpu.ms(64, 64, 96, 160) + found.round_trip_ms > 0
    assert world.pool.used_bytes == 0


def test_a_device_behind_the_host_is_timed_by_its_own_events() -> None:
    shapes = BaseShapes(NUM_LAYERS, SIZES)
    device = Device()

    def forward(num_tokens: int, lora: ProbeLora) -> None:
        x = torch.ones(num_tokens, 96)
        for layer in range(NUM_LAYERS):
            for group in ("qkv", "o"):
                lora.start(layer, group, x)
                lora.finish(layer, group, x, x)

    workers: Any = None
    probes = EngineProbes(workers, forward, lambda _: 0.0, shapes, torch.float32, cuda=device)
    assert probes.layer_s(8)[1] == pytest.approx(2e-3)  # two products, each of which took the events' 1 ms
    assert (
        device.host_clock["compute"] == 2 * 2 * NUM_LAYERS * 4
    )  # waited for the last event of four forwards
    assert probes.slowdown(8) == 1.0
