"""Bad adapters: each is refused with a reason that names what is wrong, or served exactly as PEFT would."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile.adapters import ADAPTER_KINDS, BAD_NAMES
from hostile.workshop import Kind, Workshop

from tests.adapters.fixtures import SHAPES, open_registry
from tests.hostile.peft_oracle import Deltas, assert_same, our_deltas, peft_deltas
from tests.waiting import PATIENCE_S
from toppings.adapters.errors import AdapterError
from toppings.adapters.registry import AdapterRegistry

MAX_REASON = 4000

pytestmark = pytest.mark.timeout(PATIENCE_S, func_only=True)  # nothing of a checkpoint holds whoever reads it


@pytest.fixture(scope="module")
def shop() -> Workshop:
    return Workshop(SHAPES)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterRegistry]:
    registry = open_registry(tmp_path_factory.mktemp("state"), dtype="bfloat16")
    yield registry
    registry.close()


@pytest.fixture(scope="module")
def plain(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shop.write(tmp_path_factory.mktemp("plain") / "plain")


@pytest.fixture(scope="module")
def plain_deltas(plain: Path) -> Deltas:
    return peft_deltas(plain)


def test_there_are_two_hundred_kinds_with_names_of_their_own() -> None:
    names = [kind.name for kind in ADAPTER_KINDS]
    assert len(set(names)) == len(names) >= 200


@pytest.mark.parametrize("kind", ADAPTER_KINDS, ids=lambda kind: kind.name)
def test_an_odd_adapter_is_refused_by_name_or_served_as_peft_does(
    kind: Kind, shop: Workshop, registry: AdapterRegistry, plain_deltas: Deltas, tmp_path: Path
) -> None:
    path = tmp_path / "odd"
    kind.make(shop, path)
    before = (registry.count(), sorted(os.listdir(registry.state_dir / "packed")))
    try:
        registry.register("odd", path)
    except AdapterError as error:
        reason = str(error).replace(str(tmp_path), "")
        assert not kind.must_serve, reason
        assert re.search(kind.reason, reason), reason
        assert len(reason) <= MAX_REASON
        assert (registry.count(), sorted(os.listdir(registry.state_dir / "packed"))) == before
        return
    try:
        assert_same(our_deltas(path), plain_deltas if kind.is_plain else peft_deltas(path))
    finally:
        registry.purge(registry.remove("odd").adapter_id)


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name[:20]))
def test_a_bad_name_is_refused(name: str, registry: AdapterRegistry, plain: Path) -> None:
    with pytest.raises(AdapterError) as refusal:
        registry.register(name, plain)
    assert len(str(refusal.value)) <= MAX_REASON
    assert registry.count() == 0


def test_what_was_refused_leaves_the_registry_usable(registry: AdapterRegistry, plain: Path) -> None:
    record = registry.register("good", plain)
    assert registry.get("good") == record
    registry.purge(registry.remove("good").adapter_id)
    shutil.rmtree(plain)
    assert registry.count() == 0
