"""The documents name the families that there are, and show one as it is written."""

import re
from pathlib import Path

from tests.engine import oracle
from tests.model import checkpoints
from toppings.model import families
from toppings.model.families import ACTIVATIONS, FAMILIES
from toppings.ops import activation

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
