"""A replica's adapters, on the front's machine and on another one, without Ray."""

import asyncio
import shutil
from pathlib import Path

import pytest

from tests.fakes import FakeEngineClient
from tests.sources.hub_server import running_hub
from toppings.adapters.errors import AdapterError, AdapterNotFound, StateHeldError
from toppings.adapters.merges import Merge, MergePart
from toppings.adapters.registry import AdapterRegistry, Origin
from toppings.cluster.ray_serve.messages import AdapterRef
from toppings.cluster.ray_serve.node_registry import ReplicaAdapters, open_node_registry
from toppings.config import Config
from toppings.engine.base import hold_state, open_registry
from toppings.sources.adapters import FETCHED, parse_source
from toppings.sources.fetch import Room
from toppings.synth import PRESETS, AdapterShape, write_adapters, write_model


class Machine:
    """A machine with a registry, and replicas on it."""

    def __init__(self, model: Path, state_dir: Path, **settings: object) -> None:
        self.config = Config.from_settings({"model": str(model), "state_dir": str(state_dir), **settings})
        self.registry = open_registry(self.config.engine)

    def replica(self) -> tuple[ReplicaAdapters, FakeEngineClient]:
        engine = FakeEngineClient()
        return ReplicaAdapters(open_registry(self.config.engine), engine, self.config.server), engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "base"
    write_model(path, PRESETS["tiny"])
    return path


@pytest.fixture
def sources(model: Path, tmp_path: Path) -> Path:
    write_adapters(tmp_path / "adapters", model, AdapterShape(ranks=(4, 8)), count=2)
    return tmp_path / "adapters"


@pytest.fixture
def front(model: Path, tmp_path: Path) -> Machine:
    return Machine(model, tmp_path / "front")


@pytest.fixture
def elsewhere(model: Path, tmp_path: Path) -> Machine:
    return Machine(model, tmp_path / "elsewhere")


def load(machine: Machine, name: str, path: Path, *, replace: bool = False) -> AdapterRef:
    return AdapterRef.of(machine.registry.register(name, path, replace=replace))


def change(target: Path, source: Path) -> None:
    """Other weights at the same place."""
    shutil.rmtree(target)
    shutil.copytree(source, target)


async def test_on_the_fronts_machine_the_id_is_the_fronts(front: Machine, sources: Path) -> None:
    ref = load(front, "a", sources / "adapter-00000")
    adapters, _ = front.replica()
    assert await adapters.resolve(ref) == ref.generation
    assert adapters.name_of(ref.generation) == "a"


async def test_elsewhere_it_is_registered_from_its_path_when_first_named(
    front: Machine, elsewhere: Machine, sources: Path
) -> None:
    load(front, "other", sources / "adapter-00001")
    ref = load(front, "a", sources / "adapter-00000")
    adapters, _ = elsewhere.replica()
    adapter_id = await adapters.resolve(ref)
    assert elsewhere.registry.get("a").adapter_id == adapter_id != ref.generation
    shutil.rmtree(ref.path)  # from now on it is the machine's own
    assert await adapters.resolve(ref) == adapter_id
    assert await elsewhere.replica()[0].resolve(ref) == adapter_id


async def test_a_merge_is_served_on_the_fronts_machine_and_refused_by_name_elsewhere(
    front: Machine, elsewhere: Machine, sources: Path
) -> None:
    load(front, "a", sources / "adapter-00000")
    ref = AdapterRef.of(front.registry.merge("mix", Merge((MergePart("a", 2.0),))))
    adapters, _ = front.replica()
    assert await adapters.resolve(ref) == ref.generation
    adapters, _ = elsewhere.replica()
    with pytest.raises(AdapterError, match="'mix' is a merge, which was made on the front's machine"):
        await adapters.resolve(ref)


async def fetch(machine: Machine, name: str, tmp_path: Path) -> AdapterRef:
    """As the front does it for a request."""
    [source] = (parse_source(text) for text in machine.config.server.adapter_source)
    found = source.find("one/resolve/main")
    path = found.bring(tmp_path / "part", Room(1 << 20, 60.0))
    record = machine.registry.register(name, path, origin=Origin.SOURCE, source=found.where)
    shutil.rmtree(path)
    return AdapterRef.of(record)


async def test_elsewhere_what_came_from_a_source_is_fetched_once_for_all_replicas(
    model: Path, sources: Path, tmp_path: Path
) -> None:
    shutil.copytree(sources / "adapter-00000", tmp_path / "hub" / "org" / "one")
    with running_hub(tmp_path / "hub") as hub:
        settings = {"adapter_source": [f"{hub.url}/org"]}
        front, elsewhere = (Machine(model, tmp_path / name, **settings) for name in ("front", "elsewhere"))
        ref = await fetch(front, "one/resolve/main", tmp_path)
        assert await front.replica()[0].resolve(ref) == ref.generation
        replicas = [elsewhere.replica()[0] for _ in range(3)]
        ids = await asyncio.gather(*(replica.resolve(ref) for replica in replicas * 2))
        record = elsewhere.registry.get(ref.name)
        assert {*ids} == {record.adapter_id}
        assert (record.path, record.digest) == (ref.path, ref.digest)
        assert hub.num_fetched["org/one/adapter_model.safetensors"] == 2  # by each machine once
        assert list((elsewhere.registry.state_dir / FETCHED).iterdir()) == []


async def test_elsewhere_another_revision_or_none_is_said(model: Path, sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "adapter-00000", tmp_path / "hub" / "org" / "one")
    with running_hub(tmp_path / "hub") as hub:
        front = Machine(model, tmp_path / "front", adapter_source=[f"{hub.url}/org"])
        ref = await fetch(front, "one/resolve/main", tmp_path)
        change(tmp_path / "hub" / "org" / "one", sources / "adapter-00001")
        other = Machine(model, tmp_path / "other", adapter_source=[f"{hub.url}/org"])
        with pytest.raises(AdapterError, match="is not to be had any more; there is"):
            await other.replica()[0].resolve(ref)
        bare = Machine(model, tmp_path / "bare")
        with pytest.raises(AdapterNotFound, match="no adapter source may be asked"):
            await bare.replica()[0].resolve(ref)
        assert bare.registry.count() == other.registry.count() == 0


async def test_content_that_is_not_what_the_front_registered_is_refused(
    front: Machine, elsewhere: Machine, sources: Path
) -> None:
    ref = load(front, "a", sources / "adapter-00000")
    change(sources / "adapter-00000", sources / "adapter-00001")
    adapters, _ = elsewhere.replica()
    with pytest.raises(AdapterError, match="has changed since 'a' was registered"):
        await adapters.resolve(ref)
    with pytest.raises(AdapterNotFound):
        elsewhere.registry.get("a")


async def test_a_path_that_the_machine_does_not_have_is_named(
    front: Machine, elsewhere: Machine, sources: Path
) -> None:
    ref = load(front, "a", sources / "adapter-00000")
    shutil.rmtree(ref.path)
    with pytest.raises(AdapterNotFound, match="adapter-00000"):
        await elsewhere.replica()[0].resolve(ref)


async def test_a_reload_in_place_is_another_generation(
    front: Machine, elsewhere: Machine, sources: Path
) -> None:
    machines = [front.replica()[0], elsewhere.replica()[0]]
    old = load(front, "a", sources / "adapter-00000")
    before = [await adapters.resolve(old) for adapters in machines]
    change(sources / "adapter-00000", sources / "adapter-00001")
    new = load(front, "a", sources / "adapter-00000", replace=True)
    for adapters, old_id in zip(machines, before):
        assert await adapters.resolve(new) != old_id
        assert await adapters.resolve(old) == old_id  # requests that are under way keep theirs
    late = await front.replica()[0].resolve(old)
    assert late == old.generation  # also where it was never asked for before


async def test_a_removed_adapter_leaves_engine_and_registry(
    front: Machine, elsewhere: Machine, sources: Path
) -> None:
    ref = load(front, "a", sources / "adapter-00000")
    adapters, engine = elsewhere.replica()
    adapter_id = await adapters.resolve(ref)
    await adapters.retire(ref)
    assert engine.removed == [adapter_id]
    packed = Path(elsewhere.registry.get_by_id(adapter_id).packed_path)
    assert packed.exists()  # a neighbour may still use it
    await adapters.purge(ref)
    assert not packed.exists()
    with pytest.raises(AdapterNotFound):
        elsewhere.registry.get("a")


async def test_an_adapter_nobody_asked_for_is_removed_as_well(front: Machine, sources: Path) -> None:
    """An engine may have loaded it by itself, at its start."""
    ref = load(front, "a", sources / "adapter-00000")
    adapters, engine = front.replica()
    front.registry.remove("a")
    await adapters.retire(ref)
    assert engine.removed == [ref.generation]


async def test_the_same_content_again_survives_the_end_of_its_first_generation(
    front: Machine, elsewhere: Machine, sources: Path
) -> None:
    first = load(front, "a", sources / "adapter-00000")
    second = load(front, "a", sources / "adapter-00000", replace=True)
    adapters, engine = elsewhere.replica()
    assert await adapters.resolve(first) == await adapters.resolve(second)
    await adapters.retire(first)
    await adapters.purge(first)
    assert engine.removed == []
    assert elsewhere.registry.get("a").adapter_id == await adapters.resolve(second)


async def test_an_adapter_that_comes_back_after_its_removal_is_a_new_one(
    front: Machine, elsewhere: Machine, sources: Path
) -> None:
    first = load(front, "a", sources / "adapter-00000")
    adapters, engine = elsewhere.replica()
    old_id = await adapters.resolve(first)
    await adapters.retire(first)  # its packed file is still there
    again = load(front, "a", sources / "adapter-00000", replace=True)
    assert await adapters.resolve(again) != old_id
    assert engine.removed == [old_id]


async def test_pinned_adapters_are_pinned_where_they_come_later(
    front: Machine, elsewhere: Machine, sources: Path
) -> None:
    load(front, "a", sources / "adapter-00000")
    ref = AdapterRef.of(front.registry.set_pinned("a", True))
    adapters, engine = elsewhere.replica()
    adapter_id = await adapters.resolve(ref)
    assert engine.pinned == {adapter_id: True}
    await adapters.pin(ref, False)
    assert engine.pinned == {adapter_id: False}


def test_processes_of_one_machine_pack_the_start_up_directory_once(model: Path, sources: Path) -> None:
    settings = {"model": str(model), "state_dir": str(sources.parent / "state"), "adapters": str(sources)}
    config = Config.from_settings(settings)
    registries: list[AdapterRegistry] = [
        open_node_registry(config, is_front=is_front) for is_front in (False, True, False)
    ]
    assert [registry.live_ids() for registry in registries] == [[1, 2]] * 3


def test_the_demo_brings_its_adapters(tmp_path: Path) -> None:
    registry = open_node_registry(
        Config.from_settings({"model": "demo", "state_dir": str(tmp_path)}), is_front=True
    )
    assert "pirate" in [record.name for record in registry.list()]


def test_a_replica_that_starts_late_does_not_bring_back_what_was_unloaded(model: Path, sources: Path) -> None:
    settings = {"model": str(model), "state_dir": str(sources.parent / "state"), "adapters": str(sources)}
    config = Config.from_settings(settings)
    front = open_node_registry(config, is_front=True)
    front.remove("adapter-00000")
    replica = open_node_registry(config, is_front=False)
    assert [record.name for record in replica.list()] == ["adapter-00001"]


def test_what_came_from_a_source_goes_with_it(model: Path, sources: Path, tmp_path: Path) -> None:
    settings = {"model": str(model), "state_dir": str(tmp_path / "state")}
    front = open_node_registry(Config.from_settings(settings), is_front=True)
    source = f"dir:{sources}/adapter-00000@1"
    front.register("adapter-00000", sources / "adapter-00000", origin=Origin.SOURCE, source=source)
    front.close()
    kept = open_node_registry(
        Config.from_settings({**settings, "adapter_source": [f"dir:{sources}"]}), is_front=True
    )
    assert kept.count() == 1
    kept.close()
    assert open_node_registry(Config.from_settings(settings), is_front=True).count() == 0


def test_two_fronts_do_not_share_a_directory(model: Path, tmp_path: Path) -> None:
    config = Config.from_settings({"model": str(model), "state_dir": str(tmp_path / "state")})
    front = open_node_registry(config, is_front=True)
    with pytest.raises(StateHeldError, match="another `toppings up`"):
        open_node_registry(config, is_front=True)
    with pytest.raises(StateHeldError, match=r"\(toppings up\)"):
        hold_state(config.engine, "toppings serve")
    front.close()
    hold_state(config.engine, "toppings serve").close()
