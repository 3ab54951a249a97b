import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.adapters.fixtures import NUM_LAYERS, SHAPES, open_registry, write_adapter
from tests.waiting import PATIENCE_S, wait_until
from toppings.adapters import arena as arena_module
from toppings.adapters import host_entry
from toppings.adapters.arena import HostArena
from toppings.adapters.checkpoint import read_checkpoint
from toppings.adapters.errors import AdapterError
from toppings.adapters.eviction import LruPolicy
from toppings.adapters.host_entry import HostEntry
from toppings.adapters.host_store import HostStore
from toppings.adapters.packed import PackedAdapter, pack_weights
from toppings.adapters.registry import AdapterRegistry


class SlowSource:
    """A registry whose packed files open only while `gate` is set."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self.registry = registry
        self.gate = threading.Event()
        self.gate.set()
        self.opened: list[int] = []

    def open_packed(self, adapter_id: int) -> PackedAdapter:
        assert self.gate.wait(PATIENCE_S)
        self.opened.append(adapter_id)
        return self.registry.open_packed(adapter_id)

    def rebuild(self, adapter_id: int) -> None:
        self.registry.rebuild(adapter_id)


@pytest.fixture
def source(tmp_path: Path) -> SlowSource:
    """Adapters 1 to 6 of rank 4 (all the same size), 7 of rank 8 and 8 of rank 1."""
    registry = open_registry(tmp_path / "state")
    for i in range(1, 9):
        registry.register(str(i), write_adapter(tmp_path / str(i), rank={7: 8, 8: 1}.get(i, 4), seed=i))
    return SlowSource(registry)


@pytest.fixture
def make_store(source: SlowSource, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], HostStore]]:
    """A store with room for some rank-4 adapters; who asked is not protected unless a test says so."""
    monkeypatch.setattr(host_entry, "WANTED_S", 0.0)
    stores = []

    def make(num_adapters: float) -> HostStore:
        size = source.registry.get("1").num_bytes
        stores.append(HostStore(int(num_adapters * size), source, LruPolicy()))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def read(store: HostStore, adapter_id: int) -> HostEntry:
    """Asks as the engine does until the adapter is there."""
    wait_until(lambda: store.request(adapter_id).is_ready)
    return store.request(adapter_id)


def assert_content(source: SlowSource, entry: HostEntry) -> None:
    path = source.registry.get_by_id(entry.adapter_id).path
    layout, blocks = pack_weights(read_checkpoint(path, SHAPES), "float32")
    content = np.concatenate([entry.layer_view(layer) for layer in range(NUM_LAYERS)])
    assert content.tobytes() == blocks.numpy().tobytes()
    assert entry.layout == layout


def test_adapter_is_read_by_the_thread_and_found_whole(
    source: SlowSource, make_store: Callable[[float], HostStore]
) -> None:
    store = make_store(2)
    source.gate.clear()
    entry = store.request(1)
    assert not entry.has_room  # the caller was not kept
    source.gate.set()
    assert read(store, 1) is entry
    assert entry.num_layers_ready == NUM_LAYERS
    assert entry.ready_at is not None
    assert_content(source, entry)
    assert store.used_bytes == entry.layout.num_bytes
    store.check_integrity()


def test_another_process_maps_the_arena_and_finds_the_layer(
    source: SlowSource, make_store: Callable[[float], HostStore]
) -> None:
    store = make_store(2)
    entry = read(store, 1)
    code = (
        "import mmap, sys; fd, size, start, stop = map(int, sys.argv[1:]);"
        "sys.stdout.buffer.write(mmap.mmap(fd, size, prot=mmap.PROT_READ)[start:stop])"
    )
    start = entry.offsets[1]
    args = [store.arena.fd, store.arena.size_bytes, start, start + entry.layout.layer_bytes(1)]
    command = [sys.executable, "-c", code, *map(str, args)]
    output = subprocess.run(command, pass_fds=[store.arena.fd], capture_output=True, check=True).stdout
    assert output == entry.layer_view(1).tobytes()


def test_least_recently_used_leaves_when_the_store_is_full(
    source: SlowSource, make_store: Callable[[float], HostStore]
) -> None:
    store = make_store(2)
    first, second = read(store, 1), read(store, 2)
    assert store.try_pin(first)
    store.unpin(first)
    read(store, 3)
    assert sorted(store.ready_ids()) == [1, 3]
    assert store.counters["host_evictions"] == 1
    assert not store.try_pin(second)
    store.check_integrity()


def test_pinned_entry_is_neither_evicted_nor_moved(
    source: SlowSource, make_store: Callable[[float], HostStore]
) -> None:
    store = make_store(2)
    read(store, 2)
    entry = read(store, 1)
    offsets = list(entry.offsets)
    assert store.try_pin(entry)
    for adapter_id in (3, 4, 5, 8):
        read(store, adapter_id)
    assert entry.offsets == offsets
    assert_content(source, entry)
    store.unpin(entry)


def test_read_waits_for_room_until_somebody_unpins(
    source: SlowSource, make_store: Callable[[float], HostStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_entry, "WANTED_S", 60.0)
    store = make_store(1)
    entry = read(store, 1)
    assert store.try_pin(entry)
    waiting = store.request(2)
    wait_until(lambda: 2 in source.opened)
    assert not waiting.has_room
    store.unpin(entry)
    assert_content(source, read(store, 2))


def test_read_that_nobody_wants_any_more_gives_up_its_place_in_the_queue(
    make_store: Callable[[float], HostStore],
) -> None:
    store = make_store(1)
    entry = read(store, 1)
    assert store.try_pin(entry)
    store.request(2)
    wait_until(lambda: store.find(2) is None)
    store.unpin(entry)


def test_entry_that_is_waited_for_is_not_evicted_for_another(
    source: SlowSource, make_store: Callable[[float], HostStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_entry, "WANTED_S", 60.0)
    store = make_store(1)
    entry = read(store, 1)
    other = store.request(2)
    wait_until(lambda: 2 in source.opened)
    assert entry.is_ready
    assert not other.has_room
    assert store.try_pin(entry)  # it was come for
    store.unpin(entry)
    read(store, 2)
    assert store.find(1) is None


def test_fragments_that_suffice_in_total_are_joined(
    source: SlowSource, make_store: Callable[[float], HostStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(4)
    entries = {i: read(store, i) for i in (1, 2, 3, 4)}
    assert store.try_remove(1)
    assert store.try_remove(3)
    offsets = {i: list(entries[i].offsets) for i in (2, 4)}
    monkeypatch.setattr(host_entry, "WANTED_S", 60.0)
    for i in (2, 4):
        store.request(i)  # waited for, so that they may move but not leave
    assert_content(source, read(store, 7))
    assert sorted(store.ready_ids()) == [2, 4, 7]
    assert {i: entries[i].offsets for i in (2, 4)} != offsets
    for i in (2, 4):
        assert_content(source, entries[i])
    assert store.used_bytes == store.capacity_bytes
    store.check_integrity()


def test_adapter_bigger_than_the_store_is_an_error(make_store: Callable[[float], HostStore]) -> None:
    store = make_store(1)
    with pytest.raises(AdapterError, match="host_store_bytes"):
        wait_until(lambda: store.request(7).is_ready)


def test_failed_read_is_reported_once_and_then_tried_again(
    source: SlowSource, make_store: Callable[[float], HostStore], tmp_path: Path
) -> None:
    store = make_store(2)
    record = source.registry.get_by_id(1)
    hidden = tmp_path / "hidden"
    Path(record.path).rename(hidden)
    Path(record.packed_path).unlink()
    with pytest.raises(AdapterError, match="no adapter directory"):
        wait_until(lambda: store.request(1).is_ready)
    assert store.used_bytes == 0
    hidden.rename(record.path)
    assert_content(source, read(store, 1))


def test_prefetch_after_a_failed_read_tries_again_without_an_error(
    source: SlowSource, make_store: Callable[[float], HostStore], tmp_path: Path
) -> None:
    store = make_store(2)
    record = source.registry.get_by_id(1)
    Path(record.path).rename(tmp_path / "hidden")
    Path(record.packed_path).unlink()
    failed = store.request(1)
    wait_until(lambda: failed.error is not None)
    (tmp_path / "hidden").rename(record.path)
    store.prefetch(1)
    assert_content(source, read(store, 1))


def test_damaged_block_is_made_again_from_the_source(
    source: SlowSource, make_store: Callable[[float], HostStore]
) -> None:
    file = Path(source.registry.get_by_id(1).packed_path)
    data = bytearray(file.read_bytes())
    data[-70] ^= 1
    file.write_bytes(data)
    assert_content(source, read(make_store(2), 1))


def test_removal_waits_for_whoever_uses_the_entry(make_store: Callable[[float], HostStore]) -> None:
    store = make_store(2)
    entry = read(store, 1)
    assert store.try_pin(entry)
    assert not store.try_remove(1)
    store.unpin(entry)
    assert store.try_remove(1)
    assert store.used_bytes == 0
    assert store.try_remove(1)  # gone is gone


def test_removal_before_the_read_cancels_it(
    source: SlowSource, make_store: Callable[[float], HostStore]
) -> None:
    store = make_store(2)
    source.gate.clear()
    store.request(1)
    assert store.try_remove(1)
    source.gate.set()
    read(store, 2)
    assert store.ready_ids() == [2]
    store.check_integrity()


def test_small_entries_survive_random_use(
    source: SlowSource, make_store: Callable[[float], HostStore]
) -> None:
    store = make_store(2.7)
    rng = np.random.default_rng(0)
    for _ in range(150):
        entry = read(store, int(rng.integers(1, 9)))
        if store.try_pin(entry):
            assert_content(source, entry)
            store.unpin(entry)
        if rng.random() < 0.2:
            store.try_remove(int(rng.integers(1, 9)))
        store.check_integrity()
    assert store.counters["host_evictions"] > 0


# --- the arena ---


class FakeCudart:
    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.calls: list[tuple[Any, ...]] = []

    def cudaHostRegister(self, *args: int) -> int:
        self.calls.append(("register", *args))
        return self.error

    def cudaHostUnregister(self, *args: int) -> int:
        self.calls.append(("unregister", *args))
        return 0


def test_pages_are_locked_and_unlocked_with_cuda() -> None:
    arena, cudart = HostArena(4096), FakeCudart()
    address = arena.address
    assert arena.lock_pages(cudart)
    arena.close()
    assert cudart.calls == [("register", address, 4096, 1), ("unregister", address)]


def test_memory_is_locked_in_pieces_as_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = 1 << 16
    monkeypatch.setattr(arena_module, "PIECE_BYTES", piece)
    arena, cudart = HostArena(6 * piece), FakeCudart()
    arena.lock_pages(cudart)
    first = [call[2] for call in cudart.calls]
    assert piece <= sum(first) < 3 * piece
    middle = 3 * piece + 5000
    assert len(list(arena_module.within_pieces(arena.view[middle : middle + 100]))) == 1
    arena.use(middle, 100)
    arena.use(middle, 100)
    _, address, num_bytes, _ = cudart.calls[-1]
    assert len(cudart.calls) == len(first) + 1
    assert address % piece == 0
    assert num_bytes == piece
    assert address <= arena.address + middle < address + piece
    arena.use_all()
    ranges = sorted(call[1:3] for call in cudart.calls)
    assert [start for start, _ in ranges[1:]] == [start + size for start, size in ranges[:-1]]
    assert (ranges[0][0], sum(size for _, size in ranges)) == (arena.address, arena.size_bytes)
    parts = list(arena_module.within_pieces(arena.view[100:-50]))
    assert [size for _, size in ranges][1:-1] == [stop - start for start, stop in parts][1:-1]
    arena.close()
    assert sorted(call[1] for call in cudart.calls if call[0] == "unregister") == [s for s, _ in ranges]


def test_where_no_more_can_be_locked_memory_serves_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(arena_module, "PIECE_BYTES", 1 << 16)
    arena, cudart = HostArena(1 << 19), FakeCudart()
    arena.lock_pages(cudart)
    cudart.error = 2
    arena.use_all()
    arena.use_all()
    arena.view[:] = 1
    assert caplog.text.count("pageable memory") == 1
    arena.close()


def test_refusal_by_cuda_is_an_error() -> None:
    arena = HostArena(4096)
    with pytest.raises(RuntimeError, match="error 2"):
        arena.lock_pages(FakeCudart(error=2))
    arena.close()


def test_arena_without_memfd_is_mappable_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    arena = HostArena(4096)
    arena.view[7] = 42
    with mmap.mmap(arena.fd, 4096) as other:
        assert other[7] == 42
    arena.close()


def test_overlapping_move_keeps_the_content() -> None:
    arena = HostArena(1 << 16)
    arena.view[1000:21000] = content = np.arange(20000, dtype=np.uint64).astype(np.uint8)
    arena.move(1000, 900, 20000)
    assert (arena.view[900:20900] == content).all()
    arena.close()


def test_an_adapter_that_cannot_be_read_is_told_once_until_it_can(
    make_store: Callable[[float], HostStore],
    source: SlowSource,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = make_store(2)

    def fail() -> None:
        store.prefetch(1)
        wait_until(lambda: (entry := store.find(1)) is not None and entry.error is not None)

    Path(source.registry.get("1").packed_path).unlink()
    (tmp_path / "1").rename(tmp_path / "away")
    for _ in range(3):
        fail()
    assert caplog.text.count("adapter 1 cannot be read") == 1
    (tmp_path / "away").rename(tmp_path / "1")
    store.prefetch(1)
    wait_until(lambda: (entry := store.find(1)) is not None and entry.is_ready)
