"""What may follow, token by token, for the demo's vocabulary."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from toppings.demo import demo_model_dir
from toppings.grammar import StructureError, compiler
from toppings.grammar.compiler import Compiler, load_vocabulary
from toppings.grammar.guide import Guide
from toppings.model.config import ModelConfig
from toppings.ops.token_mask import flags_of
from toppings.sampling_params import Structure, StructureKind
from toppings.text import TextModel

MODEL = ModelConfig.from_checkpoint(demo_model_dir())
[EOS] = MODEL.eos_token_ids


@pytest.fixture(scope="module")
def compiling() -> Iterator[Compiler]:
    made = Compiler(demo_model_dir(), MODEL.vocab_size, MODEL.eos_token_ids)
    yield made
    made.close()


@pytest.fixture(scope="module")
def text() -> TextModel:
    return TextModel.load(demo_model_dir())


def allowed(guide: Guide, output: list[int]) -> list[int]:
    return np.flatnonzero(flags_of(guide.mask(output), MODEL.vocab_size)).tolist()


def guide_of(compiling: Compiler, kind: str, text: str) -> Guide:
    return Guide(compiling.compile(Structure(StructureKind(kind), text)).result(), MODEL.vocab_size)


def test_what_may_follow_are_the_tokens_that_go_on_with_the_text(
    compiling: Compiler, text: TextModel
) -> None:
    guide = guide_of(compiling, "choice", '["yes", "yesterday", "no"]')
    firsts = {text.decode([token]) for token in allowed(guide, [])}
    assert firsts <= {"y", "ye", "yes", "yest", "yester", "yesterday", "n", "no"}
    assert {"y", "n"} <= firsts
    tokens = text.encode("yes", add_special_tokens=False)
    after = allowed(guide, tokens)
    assert EOS in after
    assert {text.decode([token])[0] for token in after if token != EOS} == {"t"}


def test_the_end_alone_may_follow_what_is_complete(compiling: Compiler, text: TextModel) -> None:
    guide = guide_of(compiling, "choice", '["yes", "no"]')
    tokens = text.encode("no", add_special_tokens=False)
    assert EOS not in allowed(guide, tokens[:-1])
    assert allowed(guide, tokens) == [EOS]
    assert allowed(guide, [*tokens, EOS]) == [EOS]  # asked for by who ran ahead
    assert allowed(guide, [*tokens, EOS, 5]) == [EOS]


def test_the_same_is_said_when_asked_again_and_after_several_tokens(
    compiling: Compiler, text: TextModel
) -> None:
    pattern = "[0-9]{4}-[a-z]{5}"
    tokens = text.encode("2024-lemon", add_special_tokens=False)
    one_by_one, at_once = guide_of(compiling, "regex", pattern), guide_of(compiling, "regex", pattern)
    for length in range(len(tokens)):
        first = allowed(one_by_one, tokens[:length])
        assert tokens[length] in first
        assert allowed(one_by_one, tokens[:length]) == first
    assert allowed(at_once, tokens) == allowed(one_by_one, tokens) == [EOS]


def test_a_token_that_does_not_belong_ends_it(compiling: Compiler, text: TextModel) -> None:
    guide = guide_of(compiling, "regex", "[0-9]+")
    with pytest.raises(StructureError, match="cannot be followed any further"):
        guide.mask(text.encode("zebra", add_special_tokens=False))
    with pytest.raises(StructureError):
        guide.mask(text.encode("zebra", add_special_tokens=False))


def test_a_structure_is_compiled_once_and_few_are_kept(
    compiling: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "MAX_KEPT", 2)
    first, second, third = (Structure(StructureKind.REGEX, f"{i}+") for i in range(3))
    compiled = compiling.compile(first)
    assert compiling.compile(first) is compiled
    compiling.compile(second)
    compiling.compile(first)
    compiling.compile(third)
    assert compiling.compile(first) is compiled  # the second was asked for longest ago
    assert len(compiling._kept) == 2


def test_what_cannot_be_compiled_says_so_to_everyone(compiling: Compiler) -> None:
    for _ in range(2):
        with pytest.raises(StructureError, match=r"the regex cannot be followed.*unclosed"):
            compiling.compile(Structure(StructureKind.REGEX, "[a")).result()


def test_a_checkpoint_that_says_too_little_is_named(tmp_path: Path) -> None:
    with pytest.raises(StructureError, match="end-of-sequence"):
        load_vocabulary(demo_model_dir(), MODEL.vocab_size, ())
    with pytest.raises(StructureError, match=r"tokenizer\.json"):
        load_vocabulary(tmp_path, MODEL.vocab_size, (1,))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(StructureError, match=r"tokenizer\.json"):
        load_vocabulary(tmp_path, MODEL.vocab_size, (1,))
