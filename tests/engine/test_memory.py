from pathlib import Path

import pytest

from tests.engine.oracle import make_model
from tests.streams import Device
from toppings.config import ConfigError, EngineConfig
from toppings.engine.memory import DeviceMemory, measure
from toppings.model.decoder import Decoder

GIB = 2**30


def test_the_cache_gets_what_the_others_leave() -> None:
    memory = DeviceMemory(total=80 * GIB, free=66 * GIB, activations=2 * GIB)
    assert memory.cache_bytes(utilization=0.75, pool_bytes=4 * GIB) == (60 - 14 - 2 - 4) * GIB


def test_a_device_that_is_too_small_is_refused_with_the_numbers() -> None:
    memory = DeviceMemory(total=1000, free=400, activations=100)
    assert memory.cache_bytes(utilization=0.9, pool_bytes=199) == 1
    with pytest.raises(ConfigError, match=r"take 600, a step 100, adapters 250 .*: 50 too many"):
        memory.cache_bytes(utilization=0.9, pool_bytes=250)


class FakeCuda(Device):
    """Says how much memory a step took, if one has run."""

    def empty_cache(self) -> None:
        pass

    def reset_peak_memory_stats(self) -> None:
        self.host_clock.clear()

    def memory_allocated(self) -> int:
        return 500

    def max_memory_allocated(self) -> int:
        assert self.host_clock, "nothing has run"
        return 800

    def mem_get_info(self) -> tuple[int, int]:
        return 4000, 9000


def test_a_step_its_adapters_and_its_splits_count_as_activations(tmp_path: Path) -> None:
    decoder = Decoder.load(make_model(tmp_path / "model"))
    config = EngineConfig(max_num_batched_tokens=70, max_num_seqs=5, max_model_len=600)
    shrunk = 4 * 3 * 512 * 70  # fp32, modules of a group, the largest rank, rows
    model = decoder.config
    splits = 4 * 5 * 3 * model.num_heads * (model.head_dim + 2)  # fp32, sequences, splits of 600 tokens
    assert measure(decoder, config, FakeCuda()) == DeviceMemory(9000, 4000, 300 + shrunk + splits)
