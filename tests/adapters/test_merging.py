"""Adapters summed into one: PEFT's own `add_weighted_adapter` is the oracle."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model

from tests.adapters.fixtures import (
    SHAPES,
    make_tensors,
    open_registry,
    tensor_key,
    tiny_llama,
    write_adapter,
)
from toppings.adapters.checkpoint_plan import module_name
from toppings.adapters.errors import AdapterError, AdapterExists, AdapterNotFound
from toppings.adapters.merges import MAX_PARTS, METHODS, Merge, MergePart
from toppings.adapters.packed import PackedAdapter, write_packed
from toppings.adapters.registry import AdapterRegistry
from toppings.core import MODULES

Matrices: TypeAlias = dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]
WEIGHTS = {"one": 0.7, "two": 0.4, "three": -0.3}


@pytest.fixture
def registry(tmp_path: Path) -> AdapterRegistry:
    return open_registry(tmp_path / "state")


def merge_of(weights: dict[str, float], method: str = "cat", **options: Any) -> Merge:
    return Merge(tuple(MergePart(*each) for each in weights.items()), method, **options)


def matrices(
    registry: AdapterRegistry, name: str
) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """A `[r, in]` and B `[out, r]` with its scale, by layer and module."""
    found = {}
    with registry.open_packed(registry.get(name).adapter_id) as packed:
        for layer, place in enumerate(packed.layout.layers):
            data = torch.empty(packed.layout.layer_bytes(layer), dtype=torch.uint8)
            packed.read_layer(layer, data.numpy())
            block = data.view(getattr(torch, packed.layout.dtype)).float()
            for module, rank in enumerate(place.ranks):
                if rank:
                    size_in, size_out = packed.layout.shapes.sizes[module]
                    a = block[place.a_offsets[module] :][: rank * size_in].view(rank, size_in)
                    b = block[place.b_offsets[module] :][: rank * size_out].view(rank, size_out)
                    found[layer, module] = a, b.T
    return found


def peft_model(directory: Path, configs: dict[str, dict[str, Any]]) -> Any:
    """With these adapters, which are saved, too."""
    torch.manual_seed(3)
    base, model = tiny_llama(), None
    for name, config in configs.items():
        lora = LoraConfig(init_lora_weights=False, **config)
        if model is None:
            model = get_peft_model(base, lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
    assert model is not None
    model.save_pretrained(str(directory), selected_adapters=list(configs))
    return model


def peft_matrices(model: Any, name: str) -> Matrices:
    modules = dict(model.base_model.model.named_modules())
    found = {}
    for layer in range(SHAPES.num_layers):
        for m in range(len(MODULES)):
            module = modules[module_name(layer, m)]
            if name in getattr(module, "lora_A", ()):
                a, b = module.lora_A[name].weight.data, module.lora_B[name].weight.data
                found[layer, m] = a, b * module.scaling[name]
    return found


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cat": [{}],
    "linear": [{}],
    "ties": [{"density": 0.4}, {"density": 0.6, "majority_sign": "frequency"}, {"density": 1.0}],
    "dare_linear": [{"density": 0.5, "seed": 5}],
    "dare_ties": [{"density": 0.6, "seed": 6}, {"density": 0.5, "seed": 7, "majority_sign": "frequency"}],
}


def seed_after_making(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """PEFT draws the new adapter's weights, which it then replaces, before it prunes at random."""
    monkeypatch.setattr("peft.tuners.lora.model._freeze_adapter", lambda *_: torch.manual_seed(seed))


def test_every_method_gives_the_matrices_that_peft_gives(
    registry: AdapterRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of parts that target other projections, with other scales, and with a negative weight."""
    configs = {
        name: {"r": 4, "lora_alpha": alpha, "target_modules": targets}
        for name, alpha, targets in (
            ("one", 8, ["q_proj", "v_proj"]),
            ("two", 3, ["q_proj", "k_proj", "down_proj"]),
            ("three", 16, ["q_proj", "v_proj"]),
        )
    }
    model = peft_model(tmp_path / "peft", configs)
    for name in configs:
        registry.register(name, tmp_path / "peft" / name)
    assert set(OPTIONS) == set(METHODS)
    for method, cases in OPTIONS.items():
        for number, options in enumerate(cases):
            named = f"{method}-{number}"
            registry.merge(named, merge_of(WEIGHTS, method, **options))
            density = {"density": options["density"]} if "density" in options else {}
            sign = {"majority_sign_method": options.get("majority_sign", "total")}
            seed_after_making(monkeypatch, options.get("seed", 0))
            model.add_weighted_adapter(
                list(WEIGHTS), list(WEIGHTS.values()), named, combination_type=method, **density, **sign
            )
            ours, theirs = matrices(registry, named), peft_matrices(model, named)
            assert ours.keys() == theirs.keys()
            for place, (a, b) in ours.items():
                their_a, their_b = theirs[place]
                torch.testing.assert_close(b @ a, their_b @ their_a)
                if method != "cat":  # there a part's weight may be on either side
                    torch.testing.assert_close(a, their_a)
                    torch.testing.assert_close(b, their_b)


def test_a_sum_of_other_ranks_is_exact_and_of_their_rank_together(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    registry.register("a", write_adapter(tmp_path / "a", rank=5, modules=("q_proj", "up_proj")))
    registry.register(
        "b", write_adapter(tmp_path / "b", rank=3, modules=("q_proj",), seed=1, use_rslora=True)
    )
    record = registry.merge("mix", merge_of({"a": 2.0, "b": -0.5}))
    assert (record.rank, record.targets) == (8, ("q_proj", "up_proj"))
    a, b, mix = (matrices(registry, name) for name in ("a", "b", "mix"))
    for place, (mix_a, mix_b) in mix.items():
        expected = 2.0 * a[place][1] @ a[place][0]
        if place in b:
            expected = expected - 0.5 * b[place][1] @ b[place][0]
        torch.testing.assert_close(mix_b @ mix_a, expected)


def test_what_is_pruned_at_random_depends_on_the_seed_alone(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        registry.register(name, write_adapter(tmp_path / name, seed=seed))
    merge = {"a": 1.0, "b": 1.0}
    first = registry.merge("first", merge_of(merge, "dare_linear", density=0.5, seed=1))
    again = registry.merge("again", merge_of(merge, "dare_linear", density=0.5, seed=1))
    other = registry.merge("other", merge_of(merge, "dare_linear", density=0.5, seed=2))
    assert first.digest == again.digest != other.digest
    assert Path(first.packed_path).read_bytes() == Path(again.packed_path).read_bytes()
    assert Path(first.packed_path).read_bytes() != Path(other.packed_path).read_bytes()


def test_a_merge_tells_what_it_is_made_of_and_outlives_it(registry: AdapterRegistry, tmp_path: Path) -> None:
    parts = {
        name: registry.register(name, write_adapter(tmp_path / name, seed=seed))
        for seed, name in enumerate("ab")
    }
    record = registry.merge("mix", merge_of({"a": 0.25, "b": 1.0}, "ties", density=0.5))
    assert record.path == "merge:ties: 0.25*a + 1*b"
    assert record.merge is not None
    assert [(p.name, p.adapter_id, p.digest, p.weight, p.scale) for p in record.merge.parts] == [
        ("a", parts["a"].adapter_id, parts["a"].digest, 0.25, 2.0),
        ("b", parts["b"].adapter_id, parts["b"].digest, 1.0, 2.0),
    ]
    before = Path(record.packed_path).read_bytes()
    registry.purge(registry.remove("a").adapter_id)
    registry.register("b", write_adapter(tmp_path / "b2", seed=9), replace=True)
    registry.close()
    reopened = open_registry(registry.state_dir)
    assert reopened.get("mix") == record
    assert Path(record.packed_path).read_bytes() == before


def test_a_lost_file_is_made_again_of_the_same_generations_or_not_at_all(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    for seed, name in enumerate("ab"):
        registry.register(name, write_adapter(tmp_path / name, seed=seed))
    record = registry.merge("mix", merge_of({"a": 0.5, "b": 0.5}, "dare_ties", density=0.5, seed=3))
    before = Path(record.packed_path).read_bytes()
    Path(record.packed_path).unlink()
    registry.open_packed(record.adapter_id).close()
    assert Path(record.packed_path).read_bytes() == before
    old = registry.get("b")
    registry.register("b", write_adapter(tmp_path / "b2", seed=9), replace=True)
    Path(record.packed_path).unlink()
    registry.open_packed(record.adapter_id).close()  # the replaced one is not purged yet
    assert Path(record.packed_path).read_bytes() == before
    registry.purge(old.adapter_id)
    Path(record.packed_path).unlink()
    with pytest.raises(AdapterError, match="'b', of which it was merged"):
        registry.open_packed(record.adapter_id)


def test_a_merge_of_merges_is_served_where_it_is_defined(registry: AdapterRegistry, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        registry.register(name, write_adapter(tmp_path / name, seed=seed))
    registry.merge("sum", merge_of({"a": 1.0, "b": 1.0}))
    registry.merge("flat", merge_of({"a": 1.0, "b": 1.0}, "linear"))
    assert registry.merge("twice", merge_of({"sum": 0.5, "flat": 0.5})).rank == 12
    assert registry.merge("flatter", merge_of({"a": 0.5, "flat": 0.5}, "linear")).rank == 4
    with pytest.raises(AdapterError, match="'sum' is no plain LoRA"):
        registry.merge("no", merge_of({"sum": 0.5, "flat": 0.5}, "linear"))


def test_a_merge_takes_the_place_of_one_of_its_parts_if_asked(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    old = registry.register("a", write_adapter(tmp_path / "a"))
    with pytest.raises(AdapterExists):
        registry.merge("a", merge_of({"a": 2.0}))
    new = registry.merge("a", merge_of({"a": 2.0}), replace=True)
    assert new.adapter_id > old.adapter_id
    assert new.merge is not None
    assert new.merge.parts[0].adapter_id == old.adapter_id


def packed_files(registry: AdapterRegistry) -> list[str]:
    return sorted(each.name for each in (registry.state_dir / "packed").iterdir())


def test_what_cannot_be_merged_is_refused_with_the_reason_and_leaves_nothing(
    registry: AdapterRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {
        tensor_key(layer, "q_proj", half): torch.zeros(300, 32) if half == "A" else torch.zeros(32, 300)
        for layer in range(SHAPES.num_layers)
        for half in "AB"
    }
    bias = {f"{key[: -len('weight')]}bias": torch.ones(32) for key in make_tensors() if "lora_B" in key}
    cases: dict[str, dict[str, Any]] = {
        "a": {},
        "five": {"rank": 5},
        "wide": {"rank": 300, "tensors": wide},
        "wider": {"rank": 300, "tensors": wide, "lora_alpha": 4},
        "bias": {"lora_bias": True, "tensors": {**make_tensors(), **bias}},
        "activated": {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
    }
    for name, settings in cases.items():
        registry.register(name, write_adapter(tmp_path / name, **settings))
    before = packed_files(registry)
    for weights, method, reason in (
        ({"a": 1.0, "five": 1.0}, "linear", "layer 0 q_proj: the parts have ranks 4, 5"),
        ({"wide": 1.0, "wider": 1.0}, "cat", "add up to 600; at most 512"),
        ({"a": 1.0, "bias": 1.0}, "cat", r"'bias' has q_proj.offset \(lora_bias or DoRA\)"),
        ({"a": 1.0, "activated": 1.0}, "cat", "'activated' is an activated LoRA"),
        ({"a": 1e38}, "cat", "layer 0 q_proj of the merge (holds|gives)"),
    ):
        with pytest.raises(AdapterError, match=reason):
            registry.merge("mix", merge_of(weights, method))
    with pytest.raises(AdapterNotFound, match="'nobody'"):
        registry.merge("mix", merge_of({"a": 1.0, "nobody": 1.0}))
    with monkeypatch.context() as patch:
        patch.setattr(PackedAdapter, "read_layer", None)  # bounds come before work
        with pytest.raises(AdapterError, match="1000 are left"):
            registry.merge("mix", merge_of({"a": 1.0}), max_bytes=1000)
    assert packed_files(registry) == before
    assert registry.find_named("mix") is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "svd"}, "merge method is 'svd'"),
        ({"method": "ties"}, "'ties' needs a density"),
        ({"method": "ties", "density": 0.0}, "density is 0.0"),
        ({"method": "ties", "density": 1.5}, "density is 1.5"),
        ({"method": "cat", "density": 0.5}, "density is of no use"),
        ({"method": "ties", "density": 0.5, "seed": 1}, "seed is of no use"),
        ({"method": "dare_linear", "density": 0.5, "seed": -1}, "seed is -1"),
        (
            {"method": "dare_linear", "density": 0.5, "majority_sign": "total"},
            "majority_sign_method is of no use",
        ),
        ({"method": "ties", "density": 0.5, "majority_sign": "most"}, "majority_sign_method is 'most'"),
    ],
)
def test_a_value_that_is_wrong_is_named(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        merge_of({"a": 1.0, "b": 1.0}, **options)


def test_parts_that_are_wrong_are_named() -> None:
    for weight in (0.0, float("nan"), float("inf")):
        with pytest.raises(AdapterError, match=f"weight of adapter 'a' is {weight}"):
            merge_of({"a": weight})
    with pytest.raises(AdapterError, match="'a' is named twice"):
        Merge((MergePart("a", 1.0), MergePart("a", 2.0)))
    for num in (0, MAX_PARTS + 1):
        with pytest.raises(AdapterError, match=f"merge of {num} adapters"):
            merge_of({str(i): 1.0 for i in range(num)})


def test_a_kind_that_is_a_product_is_summed_but_by_no_other_method(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    vera = get_peft_model(tiny_llama(), VeraConfig(r=4, target_modules=["q_proj"], save_projection=True))
    vera.save_pretrained(tmp_path / "vera")
    registry.register("vera", tmp_path / "vera")
    registry.register("a", write_adapter(tmp_path / "a"))
    assert registry.merge("sum", merge_of({"vera": 1.0, "a": 1.0})).rank == 8
    with pytest.raises(AdapterError, match="'vera' is no plain LoRA"):
        registry.merge("linear", merge_of({"vera": 1.0, "a": 1.0}, "linear"))


def test_a_merge_in_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    registry = open_registry(tmp_path / "state", dtype="bfloat16")
    for seed, name in enumerate("ab"):
        registry.register(name, write_adapter(tmp_path / name, seed=seed))
    registry.merge("mix", merge_of({"a": 0.3, "b": 0.6}, "linear"))
    a, b, mix = (matrices(registry, name) for name in ("a", "b", "mix"))
    for place, (mix_a, mix_b) in mix.items():
        root_a, root_b = (0.3 * 2) ** 0.5, (0.6 * 2) ** 0.5
        expected_a = root_a * a[place][0] + root_b * b[place][0]
        expected_b = root_a * a[place][1] / 2 + root_b * b[place][1] / 2
        assert torch.equal(mix_a, expected_a.bfloat16().float())
        assert torch.equal(mix_b, expected_b.bfloat16().float())


def test_an_adapter_of_an_earlier_version_is_summed_and_merged_otherwise_once_loaded_again(
    registry: AdapterRegistry, tmp_path: Path
) -> None:
    """Its packed file says no scales."""
    record = registry.register("a", write_adapter(tmp_path / "a"))
    file = Path(record.packed_path)
    with PackedAdapter.open(file) as packed:
        header = replace(packed.header, scales=None)
        blocks = [np.empty(packed.layout.layer_bytes(i), np.uint8) for i in range(SHAPES.num_layers)]
        for layer, block in enumerate(blocks):
            packed.read_layer(layer, block)
    file.unlink()
    write_packed(header, [block.data for block in blocks], file, is_synced=False)
    registry.merge("sum", merge_of({"a": 0.5}))
    with pytest.raises(AdapterError, match="'a' is no plain LoRA, or was registered by an earlier version"):
        registry.merge("linear", merge_of({"a": 0.5}, "linear"))
    registry.register("a", tmp_path / "a", replace=True)
    registry.merge("linear", merge_of({"a": 0.5}, "linear"))
