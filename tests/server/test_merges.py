"""Merges of adapters over HTTP: how they are asked for, told of and refused."""

from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server
from toppings.adapters.merges import Merge, MergePart
from toppings.adapters.registry import Origin
from toppings.synth import AdapterShape, write_adapters
from toppings.tenants.keys import digest_of

MIX = {"adapters": [{"name": "one", "weight": 0.25}, {"name": "two", "weight": 4.0}]}


@pytest.fixture
def parts(server: Server, model_dir: Path, tmp_path: Path) -> Server:
    """`one` and `two` of rank 4."""
    write_adapters(tmp_path / "parts", model_dir, AdapterShape(ranks=(4,)), count=2)
    for number, name in enumerate(("one", "two")):
        server.registry.register(name, tmp_path / "parts" / f"adapter-0000{number}", origin=Origin.HTTP)
    return server


async def load(server: Server, merge: dict[str, Any], name: str = "mix", **body: object) -> Any:
    return await server.post("/v1/load_lora_adapter", lora_name=name, merge=merge, **body)


async def test_a_merge_is_served_and_listed_with_what_it_is_made_of(parts: Server) -> None:
    assert (await load(parts, MIX)).text == "Success: LoRA adapter 'mix' added successfully."
    assert (await parts.complete(model="mix")).status_code == 200
    assert parts.engine.calls[-1].adapter_id == parts.registry.get("mix").adapter_id
    rows = {row["name"]: row for row in (await parts.http.get("/adapters")).json()["adapters"]}
    assert (rows["one"]["merge"], rows["mix"]["rank"]) == (None, 8)
    assert rows["mix"]["path"] == "merge:cat: 0.25*one + 4*two"
    one, two = (
        {"name": name, "weight": weight, "id": rows[name]["id"], "digest": rows[name]["digest"]}
        for name, weight in (("one", 0.25), ("two", 4.0))
    )
    assert rows["mix"]["merge"] == {
        "method": "cat",
        "density": None,
        "majority_sign_method": None,
        "seed": None,
        "adapters": [{**one, "is_current": True}, {**two, "is_current": True}],
    }


async def test_a_part_that_is_loaded_anew_or_unloaded_leaves_the_merge_as_it_is(
    parts: Server, adapters_dir: Path
) -> None:
    await load(parts, MIX)
    before = parts.registry.get("mix")
    place = str(adapters_dir / "adapter-00002")
    await parts.post("/v1/load_lora_adapter", lora_name="one", lora_path=place, load_inplace=True)
    await parts.post("/v1/unload_lora_adapter", lora_name="two")
    rows = {row["name"]: row for row in (await parts.http.get("/adapters")).json()["adapters"]}
    assert [part["is_current"] for part in rows["mix"]["merge"]["adapters"]] == [False, False]
    assert parts.registry.get("mix") == before
    assert parts.registry.is_intact(before.adapter_id)


async def test_a_merge_is_replaced_in_place(parts: Server) -> None:
    await load(parts, MIX)
    old = parts.registry.get("mix").adapter_id
    assert "already been loaded" in (await load(parts, MIX)).json()["error"]["message"]
    assert (await load(parts, {**MIX, "method": "linear"}, load_inplace=True)).status_code == 200
    assert parts.registry.get("mix").adapter_id > old
    assert parts.registry.get("mix").rank == 4


@pytest.mark.parametrize(
    ("merge", "status", "told"),
    [
        ({"adapters": []}, 400, "merge.adapters"),
        ({"adapters": [{"name": "one"}] * 17}, 400, "merge.adapters"),
        ({"adapters": [{"name": "one"}, {"name": "one"}]}, 400, "'one' is named twice"),
        ({"adapters": [{"name": "one", "weight": 0}]}, 400, "weight of adapter 'one' is 0"),
        ({"adapters": [{"name": "one", "wieght": 1.0}]}, 400, "wieght"),
        ({**MIX, "method": "svd"}, 400, "merge method is 'svd'; it must be one of cat, linear"),
        ({**MIX, "method": "ties"}, 400, "needs a density"),
        ({**MIX, "density": 0.5}, 400, "density is of no use to merge method 'cat'"),
        ({"adapters": [{"name": "one"}, {"name": "nobody"}]}, 404, "`nobody` does not exist"),
        ({"adapters": [{"name": "one"}, {"name": "base"}]}, 400, "'base' is the base model"),
    ],
)
async def test_what_is_wrong_is_named_and_leaves_nothing(
    parts: Server, merge: dict[str, Any], status: int, told: str
) -> None:
    reply = await load(parts, merge)
    assert (reply.status_code, told in reply.json()["error"]["message"]) == (status, True), reply.text
    assert parts.registry.find_named("mix") is None


async def test_a_place_and_a_merge_together_are_refused(parts: Server) -> None:
    reply = await load(parts, MIX, lora_path="one")
    assert (reply.status_code, "give one of them" in reply.text) == (400, True)


# --- tenants ---


@pytest.fixture
def tenants(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.yaml"
    path.write_text(
        "tenants:\n  acme:\n    use: [one]\n    load: ['acme-*']\n    adapter-bytes: 1000000\n"
        f'keys:\n- {{"id": "acme", "tenant": "acme", "sha256": "{digest_of(b"acme-key").hex()}"}}\n'
    )
    return path


class TestOfTenants:
    @pytest.fixture
    def settings(self, tenants: Path) -> dict[str, object]:
        return {"tenants_file": str(tenants), "api_key": "the-one"}

    async def test_one_merges_what_it_may_use_under_its_own_names_within_its_bytes(
        self, parts: Server
    ) -> None:
        parts.http.headers["Authorization"] = "Bearer acme-key"
        own = {"adapters": [{"name": "one", "weight": 2.0}]}
        assert (await load(parts, MIX, "acme-mix")).status_code == 404  # it may not see `two`
        assert (await load(parts, own, "mix")).status_code == 403
        assert (await load(parts, own, "acme-mix")).status_code == 200
        account = parts.state.book.accounts["acme"]
        object.__setattr__(account.tenant, "adapter_bytes", parts.registry.get("acme-mix").num_bytes + 1000)
        reply = await load(parts, own, "acme-more")
        assert (reply.status_code, "1000 are left" in reply.text) == (400, True)


# --- LoRAX's merged_adapters ---


async def generate(server: Server, **merged: object) -> Any:
    return await server.post("/generate", inputs="abc", parameters={"merged_adapters": merged})


async def test_loraxs_merge_is_answered_by_the_adapter_that_was_registered_so(parts: Server) -> None:
    wanted = {"ids": ["one", "two"], "weights": [0.5, 2.0]}
    refused = await generate(parts, **wanted)
    assert refused.status_code == 424
    assert (
        '{"adapters":[{"name":"one","weight":0.25},{"name":"two","weight":4.0}],"method":"linear"}'
        in (refused.json()["error"])
    )
    await load(parts, MIX, "sum")  # another method
    await load(parts, {**MIX, "method": "linear"})
    assert (await generate(parts, **wanted)).status_code == 200
    assert parts.engine.calls[-1].adapter_id == parts.registry.get("mix").adapter_id
    for other in ({**wanted, "weights": [0.5, 2.1]}, {**wanted, "ids": ["two", "one"]}):
        assert (await generate(parts, **other)).status_code == 424
    parts.registry.register("one", parts.registry.get("two").path, replace=True)
    assert (await generate(parts, **wanted)).status_code == 424  # it is of an older generation


async def test_loraxs_merge_of_parts_with_other_scales_means_something_else(
    parts: Server, model_dir: Path, tmp_path: Path
) -> None:
    write_adapters(tmp_path / "more", model_dir, AdapterShape(ranks=(4,)), count=1)
    config = tmp_path / "more" / "adapter-00000" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 1'))
    parts.registry.register("two", config.parent, replace=True)
    parts.registry.merge("mix", Merge((MergePart("one", 1.0), MergePart("two", 1.0)), "linear"))
    assert (await generate(parts, ids=["one", "two"])).status_code == 424


@pytest.mark.parametrize(
    "merged",
    [
        {"ids": []},
        {"ids": ["one", "two"], "weights": [1.0]},
        {"ids": ["one", "two"], "weights": [1.0, -1.0]},
        {"ids": ["one", "two"], "merge_strategy": "ties"},
        {"ids": ["one", "one"]},
        {"ids": ["one"], "merge_strategy": "svd"},
    ],
)
async def test_loraxs_merge_that_is_wrong_is_refused(parts: Server, merged: dict[str, Any]) -> None:
    reply = await generate(parts, **merged)
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")


async def test_loraxs_merge_and_an_adapter_together_are_refused(parts: Server) -> None:
    parameters = {"merged_adapters": {"ids": ["one"]}, "adapter_id": "one"}
    reply = await parts.post("/generate", inputs="abc", parameters=parameters)
    assert (reply.status_code, "give one of them" in reply.text) == (422, True)
