"""The loader and the pool on streams that are not there: what is queued, and whether anything can race."""

import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.adapters.fixtures import NUM_LAYERS
from tests.adapters.test_device_pool import layout
from tests.adapters.test_loader import FakeSource
from tests.streams import Device, Memory
from tests.waiting import PATIENCE_S, wait_until
from toppings.adapters import arena as arena_module
from toppings.adapters.cuda_loader import GROUP_BYTES, CudaLoader, CudaLoadHandle
from toppings.adapters.device_pool import DevicePool
from toppings.adapters.errors import AdapterError
from toppings.adapters.layout import AdapterLayout, b_first
from toppings.vital import EngineLostError

ITEM_BYTES = 4
CAPACITY_BYTES = 12 << 10


@dataclass
class World:
    """A pool and its loader over one device; adapters by name, with what kernels did to their blocks."""

    device: Device
    pool: DevicePool
    loader: CudaLoader
    slots: dict[str, int] = field(default_factory=dict)
    loads: dict[str, CudaLoadHandle] = field(default_factory=dict)
    layouts: dict[str, AdapterLayout] = field(default_factory=dict)

    def place(self, name: str, rank: int, source: FakeSource | None = None) -> bool:
        adapter = layout(rank)
        slot = self.pool.try_place(adapter)
        if slot is None:
            return False
        offsets = [self.pool.layer_offset(slot, layer) * ITEM_BYTES for layer in range(NUM_LAYERS)]
        load: Any = self.loader.start(source or FakeSource(adapter), offsets)
        self.slots[name], self.loads[name], self.layouts[name] = slot, load, adapter
        return True

    def use(self, name: str) -> None:
        """A forward's kernels read every layer; as the engine does, it waits where the load is not over."""
        is_loading = not self.loads[name].done
        for layer in range(NUM_LAYERS):
            if is_loading:
                self.loads[name].wait(layer)
            start = self.pool.layer_offset(self.slots[name], layer) * ITEM_BYTES
            stop = start + self.layouts[name].layer_bytes(layer)
            self.device.access(start, stop, f"a kernel's look at {start}", is_write=False)

    def poll(self) -> None:
        for name, load in self.loads.items():
            if load.done:
                self.pool.mark_loaded(self.slots[name])

    def evict(self, name: str) -> None:
        self.pool.free(self.slots.pop(name))
        del self.loads[name], self.layouts[name]


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def world(device: Device) -> Iterator[World]:
    pool = DevicePool(NUM_LAYERS, CAPACITY_BYTES, torch.float32)
    memory: Any = Memory(device, 0, CAPACITY_BYTES, ITEM_BYTES)
    pool.arena = memory
    loader = CudaLoader(memory, cuda=device)
    yield World(device, pool, loader)
    loader.close()


@pytest.mark.parametrize("seed", range(3))
def test_nothing_races_while_adapters_come_move_and_go(world: World, seed: int) -> None:
    rng = random.Random(seed)
    for turn in range(100):
        world.device.is_idle = rng.random() < 0.5
        world.poll()
        for name in [name for name, load in world.loads.items() if load.done and rng.random() < 0.4]:
            world.evict(name)
        for copy in range(3):
            name = f"adapter {turn} {copy}"
            if world.place(name, rng.choice([2, 3, 5, 9, 12])):
                wait_until(lambda load=world.loads[name]: len(load.events) == NUM_LAYERS)  # type: ignore[misc]
        for name in world.slots:
            if rng.random() < 0.6:
                world.use(name)
        world.device.is_idle = False
    for load in world.loads.values():
        load.wait_all()
    assert world.pool.num_compactions > 0
    assert any(access.is_write and access.stream == "compute" for access in world.device.accesses)
    world.device.check()


def test_a_load_that_breaks_off_leaves_nothing_on_its_way(world: World) -> None:
    source = FakeSource(layout(9), num_layers_ready=2)
    assert world.place("broken", 9, source)
    wait_until(lambda: len(world.loads["broken"].events) == 2)
    source.error = AdapterError("damaged")
    world.loader.notify()
    wait_until(lambda: world.loads["broken"].error is not None)
    world.evict("broken")
    world.device.access(0, CAPACITY_BYTES, "a move into its room", is_write=True)
    world.device.check()


def test_the_loaders_thread_is_on_its_streams_device(world: World) -> None:
    world.place("any", 4)
    world.loads["any"].wait_all()
    assert "adapter-loader" in world.device.threads_on_device


def test_closing_leaves_nothing_on_its_way(world: World) -> None:
    world.place("late", 9)
    wait_until(lambda: len(world.loads["late"].events) == NUM_LAYERS)
    world.loader.close()
    world.device.access(0, CAPACITY_BYTES, "something else", is_write=True)
    world.device.check()


def test_the_host_waits_for_the_copy_to_be_queued_and_no_longer(world: World) -> None:
    source = FakeSource(layout(4), num_layers_ready=0)
    world.place("slow", 4, source)
    waiter = threading.Thread(target=world.loads["slow"].wait, args=(NUM_LAYERS - 1,))
    waiter.start()
    source.num_layers_ready = NUM_LAYERS
    world.loader.notify()
    waiter.join(PATIENCE_S)
    assert not waiter.is_alive()
    assert not world.loads["slow"].layer_ready(0)  # queued, but not over


def test_a_layer_is_ready_when_its_copies_are_over(world: World) -> None:
    slot = world.pool.try_place(layout(4))
    assert slot is not None
    offsets = [world.pool.layer_offset(slot, layer) * ITEM_BYTES for layer in range(NUM_LAYERS)]
    source = FakeSource(layout(4), num_layers_ready=1)
    load: Any = world.loader.start(source, offsets, b_first(NUM_LAYERS))
    wait_until(lambda: len(load.events) == 1)  # the B of the one layer that has been read
    world.device.is_idle = True
    assert load.b_ready(0)
    assert not load.layer_ready(0)
    source.num_layers_ready = NUM_LAYERS
    world.loader.notify()
    wait_until(lambda: load.done)
    assert load.layer_ready(0)
    assert load.copy_ms == 1.0


def test_small_layers_share_an_event_and_large_ones_do_not(world: World) -> None:
    world.place("small", 4)
    world.loads["small"].wait_all()
    assert len(set(map(id, world.loads["small"].events))) == 1
    memory: Any = Memory(world.device, 0, 1 << 30)
    loader, large = CudaLoader(memory, cuda=world.device), layout(GROUP_BYTES // ITEM_BYTES // 32)
    assert large.layer_bytes(0) > GROUP_BYTES
    load: Any = loader.start(FakeSource(large), [layer << 24 for layer in range(NUM_LAYERS)])
    load.wait_all()
    loader.close()
    assert len(set(map(id, load.events))) == NUM_LAYERS


def test_no_copy_goes_over_the_border_of_two_pieces(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = 256
    monkeypatch.setattr(arena_module, "PIECE_BYTES", piece)
    source = FakeSource(layout(9))
    world.place("cut", 9, source)
    world.loads["cut"].wait_all()
    for layer in range(NUM_LAYERS):
        start = world.pool.layer_offset(world.slots["cut"], layer) * ITEM_BYTES
        size = source.layout.layer_bytes(layer)
        copies = [a for a in world.device.accesses if start <= a.start < start + size]
        assert [a.start for a in copies[1:]] == [a.stop for a in copies[:-1]]
        assert (copies[0].start, copies[-1].stop) == (start, start + size)
        address = int(source.layer_view(layer).ctypes.data) - start
        assert len(copies) > 1
        assert all((address + a.start) // piece == (address + a.stop - 1) // piece for a in copies)


def test_a_failed_read_reaches_whoever_waits(world: World) -> None:
    source = FakeSource(layout(4), num_layers_ready=0)
    source.error = AdapterError("gone")
    world.place("gone", 4, source)
    with pytest.raises(AdapterError, match="gone"):
        world.loads["gone"].wait(0)


@pytest.mark.parametrize("fails_from", [1, 2, 4, 6, 9])
def test_a_context_that_is_lost_blocks_nobody_and_ends_the_loader(world: World, fails_from: int) -> None:
    """Also where what is asked of the device while cleaning up fails again."""

    def use_three() -> None:
        for i in range(3):  # raised here, by a wait, or by what asks how the loader is
            world.place(f"{i}", 4)
            for load in world.loads.values():
                load.wait_all()
            world.loader.check()

    world.device.fails_from = fails_from
    for _ in range(2):
        with pytest.raises((EngineLostError, AdapterError, RuntimeError), match=r"CUDA error"):
            use_three()
    world.loader.close()
    assert not world.loader._thread.is_alive()
