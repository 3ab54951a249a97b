"""The documents name the families that there are, and show one as it is written; random adapters fit each."""

import re
from pathlib import Path

import pytest

from tests.engine import oracle
from tests.model import checkpoints
from toppings.adapters.checkpoint import read_checkpoint
from toppings.adapters.layout import BaseShapes
from toppings.config import ConfigError
from toppings.core import MODULES
from toppings.model import families
from toppings.model.config import ModelConfig
from toppings.model.families import ACTIVATIONS, FAMILIES
from toppings.model.files import read_json
from toppings.ops import activation
from toppings.synth import AdapterShape, write_adapters

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_families_has_all_of_them() -> None:
    named = re.findall(r"^\| (`\w+ForCausalLM`.*?) \|", (DOCS / "models.md").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(named))) == sorted(FAMILIES)


def test_the_example_of_a_family_is_what_the_code_says_and_short() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "adding-a-model.md").read_text(), re.DOTALL)
    sources = [Path(str(module.__file__)).read_text() for module in (families, checkpoints, oracle)]
    assert all(block in source for block, source in zip(blocks, sources, strict=True))
    assert sum(block.count("\n") for block in blocks) <= 60


def test_every_family_is_compared_with_transformers() -> None:
    tested = {f"{family}ForCausalLM" for family, _ in checkpoints.VARIANTS.values()}
    assert tested == FAMILIES.keys()
    named = {settings.get("model_type", name) for name, settings in oracle.FAMILIES.items()}
    assert named == {family.model_type for family in FAMILIES.values()}


def test_activations_are_those_that_there_are() -> None:
    assert set(ACTIVATIONS) == activation.ACTIVATIONS.keys()


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("phi3", ("q_proj", "up_proj"), [4, 4, 4, 0, 4, 4, 0]),
        ("mixtral", ("q_proj", "o_proj"), [4, 0, 0, 4, 0, 0, 0]),
        ("gemma2", ("down_proj",), [0, 0, 0, 0, 0, 0, 4]),
    ],
)
def test_random_adapters_fit_the_models_of_a_family(
    family: str, targets: tuple[str, ...], expected: list[int], tmp_path: Path
) -> None:
    model = oracle.make_model(tmp_path / "model", family)
    config = ModelConfig.from_checkpoint(model)
    modules = families.modules_of(read_json(model / "config.json"))
    shape = AdapterShape(ranks=(4,), targets=targets, dtype="float32")
    write_adapters(tmp_path / "made", model, shape, count=1, modules=modules)
    shapes = BaseShapes(*config.base_shapes(), config.is_fused, config.mixture)
    found = read_checkpoint(tmp_path / "made" / "adapter-00000", shapes)
    assert found.ranks() == [expected] * config.num_layers
    changed = {MODULES[module] for (_, module), weights in found.weights.items() if weights.b.any()}
    assert changed == set(targets)


def test_random_adapters_of_experts_are_refused_by_name(tmp_path: Path) -> None:
    model = oracle.make_model(tmp_path / "model", "mixtral")
    modules = families.modules_of(read_json(model / "config.json"))
    with pytest.raises(ConfigError, match=r"'up_proj' is none of .*it has q_proj, k_proj, v_proj, o_proj"):
        write_adapters(tmp_path / "made", model, AdapterShape(targets=("up_proj",)), count=1, modules=modules)
