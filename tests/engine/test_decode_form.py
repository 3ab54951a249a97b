"""The form of the decode kernels: as configured, or the one that took less time at start."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.engine.graph_fakes import FakeGraphs
from toppings.config import ConfigError, EngineConfig
from toppings.engine.decode_form import choose_decode_form, fastest_form, time_forms
from toppings.model.config import ModelConfig
from toppings.model.named import named_config
from toppings.ops import dispatch

TOY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return named_config("llama-2-7b", **TOY)


@dataclass
class FakeClock:
    """`torch.cuda` for events alone: a replay of the n-th graph takes `ms[n]`."""

    backend: FakeGraphs
    ms: tuple[float, ...]

    def Event(self, *, enable_timing: bool) -> "FakeEvent":
        assert enable_timing
        return FakeEvent(self)

    @property
    def now_ms(self) -> float:
        return sum(ms * graph.num_replays for ms, graph in zip(self.ms, self.backend.graphs, strict=True))


@dataclass
class FakeEvent:
    clock: FakeClock
    at_ms: list[float] = field(default_factory=list)

    def record(self) -> None:
        self.at_ms.append(self.clock.now_ms)

    def synchronize(self) -> None:
        assert self.at_ms

    def elapsed_time(self, other: "FakeEvent") -> float:
        return other.at_ms[0] - self.at_ms[0]


@pytest.mark.parametrize(("ms", "faster"), [((1.0, 2.0), "mbgmv"), ((3.0, 2.5), "bgmv")])
def test_the_faster_form_is_chosen(model: ModelConfig, ms: tuple[float, ...], faster: str) -> None:
    backend = FakeGraphs()
    times = time_forms(model, torch.bfloat16, "cpu", backend, FakeClock(backend, ms))
    assert list(times.values()) == pytest.approx(ms)
    assert fastest_form(times) == faster
    replays = {graph.num_replays for graph in backend.graphs}
    assert len(replays) == 1  # in turns, so that both see the same clock


@pytest.mark.parametrize("form", ["mbgmv", "bgmv"])
def test_a_configured_form_is_not_timed(model: ModelConfig, form: str) -> None:
    config = EngineConfig(device="cuda", decode_lora_form=form)
    assert choose_decode_form(config, model, torch.bfloat16) == form


@pytest.mark.parametrize(
    ("settings", "triton_devices"),
    [
        ({"device": "cpu"}, ("cuda",)),
        ({"device": "cuda", "tensor_parallel_size": 2}, ("cuda",)),
        ({"device": "cuda"}, ()),
    ],
)
def test_without_one_gpu_and_triton_nothing_is_timed(
    model: ModelConfig, settings: Any, triton_devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", triton_devices)
    assert choose_decode_form(EngineConfig(**settings), model, torch.bfloat16) == "mbgmv"


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="decode_lora_form is 'sgmv'; choose one of auto, mbgmv, bgmv"):
        EngineConfig(decode_lora_form="sgmv")
