"""What an engine tells of a cold request: when its adapter was read and copied, and who computed what."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.engine.driver import Driver, drive, hold_link
from tests.engine.oracle import make_adapter, make_model, make_prompt
from tests.waiting import wait_until
from toppings.engine.cold_notes import MAX_COLD_STEPS
from toppings.messages import ColdStart, RequestOutput

NUM_TOKENS = 2
SLOW_LINK_GBPS = 0.02


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("cold-record")
    model = make_model(root / "model")
    adapters = {f"a{i}": make_adapter(root / f"a{i}", model, rank=64, seed=i) for i in range(4)}
    return model, adapters


@pytest.fixture(scope="module")
def assisted(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Driver]:
    """Every layer that has not landed is the CPU's; a prompt of 100 tokens takes four steps."""
    model, adapters = checkpoints
    settings = {"mode": "cpu_assisted", "link_gbps": SLOW_LINK_GBPS}
    settings |= {"max_num_batched_tokens": 32, "max_num_seqs": 4}
    with drive(model, tmp_path_factory.mktemp("state"), adapters, **settings) as driver:
        yield driver


def cold_start(
    driver: Driver, adapter: str, num_prompt_tokens: int = 100, num_tokens: int = NUM_TOKENS
) -> ColdStart:
    name = f"{adapter} {num_prompt_tokens} {len(driver.tokens)}"
    driver.add(name, make_prompt(len(driver.tokens), num_prompt_tokens), num_tokens, adapter)
    driver.run()
    told = driver.first[name].cold_start
    assert told is not None, driver.errors()
    return told


def test_the_course_of_a_cold_start_is_told_in_order(assisted: Driver) -> None:
    told = cold_start(assisted, "a0")
    record = assisted.registry.get("a0")
    assert (told.adapter_id, told.rank, told.num_bytes) == (record.adapter_id, 64, record.num_bytes)
    assert told.tier == "disk"
    assert told.read is not None
    assert 0 <= told.read.from_ms <= told.read.to_ms <= told.queue_ms  # read before it was admitted
    assert [step.num_tokens for step in told.steps] == [32, 32, 32, 4]
    ends = [told.queue_ms, *(each for s in told.steps for each in (s.span.from_ms, s.span.to_ms))]
    assert ends == sorted(ends)
    assert told.steps[-1].span.to_ms <= told.first_token_ms
    loads = [layer.load for layer in told.layers if layer.load is not None]
    assert all(load.from_ms <= load.to_ms <= told.first_token_ms for load in loads)
    copies = [t for load in sorted(loads, key=lambda s: s.to_ms) for t in (load.from_ms, load.to_ms)]
    assert copies == sorted(copies)  # the link is one


def test_layers_say_where_they_were_computed(assisted: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    hold_link(monkeypatch)
    before = assisted.engine.stats(0).counters["assist_cpu_products"]
    told = cold_start(assisted, "a1", num_tokens=1)  # what comes after the first token is not told
    num_cpu = assisted.engine.stats(0).counters["assist_cpu_products"] - before
    assert sum(layer.num_cpu_products for layer in told.layers) == num_cpu > 0
    for layer in told.layers:
        assert layer.num_products == 4 * len(told.steps)  # four projection groups
        assert (layer.cpu is None) == (layer.num_slices == 0) == (layer.place == "device")
        if layer.cpu is not None:
            assert told.queue_ms <= layer.cpu.from_ms <= layer.cpu.to_ms <= told.first_token_ms
            assert layer.num_slices >= layer.num_cpu_products


def test_a_warm_request_has_no_record(assisted: Driver) -> None:
    cold_start(assisted, "a2")
    adapter_id = assisted.registry.get("a2").adapter_id
    wait_until(lambda: assisted.engine.adapters.load_of(adapter_id) is None)
    assisted.add("warm", make_prompt(9, 9), NUM_TOKENS, "a2")
    assisted.add("base", make_prompt(9, 9), NUM_TOKENS)
    assisted.run()
    assert assisted.first["warm"].cold_start is None
    assert assisted.first["base"].cold_start is None


def test_a_long_prompt_has_so_many_steps_at_most(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    model, adapters = checkpoints
    num_tokens = 8 * (MAX_COLD_STEPS + 5)
    settings = {"mode": "pipelined", "max_num_batched_tokens": 8, "max_num_seqs": 1}
    with drive(model, tmp_path, {"a0": adapters["a0"]}, **settings) as driver:
        told = cold_start(driver, "a0", num_tokens)
    assert len(told.steps) == MAX_COLD_STEPS
    assert sum(step.num_tokens for step in told.steps) == num_tokens
    assert {layer.place for layer in told.layers} == {"device"}
    assert all(layer.load is not None for layer in told.layers)  # each layer was waited for


def test_a_record_is_read_as_it_was_written(assisted: Driver) -> None:
    told = RequestOutput("sent", [1], cold_start=cold_start(assisted, "a3", 40))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=RequestOutput) == told
