"""Checkpoints whose files and configuration disagree: served as transformers serves them, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.model.checkpoints import SHAPE, build, reference_logits, run, save
from toppings.model.config import ModelConfig
from toppings.model.decoder import Decoder

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = [1, 2, 3, 50, 96]
Edit = Callable[[Path], object]


def config(**fields: Any) -> Edit:
    """Edits config.json; None removes a field."""

    def edit(path: Path) -> None:
        file = path / "config.json"
        merged = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))

    return edit


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    def edit(path: Path) -> None:
        found = load_file(path / FILE)
        change(found)
        save_file(found, path / FILE, metadata={"format": "pt"})

    return edit


def both(*edits: Edit) -> Edit:
    return lambda path: [edit(path) for edit in edits]


def other_head(found: dict[str, Tensor]) -> None:
    found[HEAD] = found[EMBED] * 0.5 + torch.randn(found[EMBED].shape, generator=torch.manual_seed(1)) * 0.1


def head_only(found: dict[str, Tensor]) -> None:
    found[HEAD] = found.pop(EMBED)


def to(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found.update({name: tensor.to(dtype) for name, tensor in found.items()})


def shards(change: Callable[[dict[str, Tensor], dict[str, Tensor]], object], **index: Any) -> Edit:
    """Splits the file in two and lets `change` move tensors between the two."""

    def edit(path: Path) -> None:
        found = load_file(path / FILE)
        names = sorted(found)
        parts = [{n: found[n] for n in names[:9]}, {n: found[n] for n in names[9:]}]
        weight_map = {n: f"{i}.safetensors" for i, part in enumerate(parts) for n in part}
        change(*parts)
        for i, part in enumerate(parts):
            save_file(part, path / f"{i}.safetensors", metadata={"format": "pt"})
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map, **index}))
        (path / FILE).unlink()

    return edit


def twice(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """The same name in both shards, with other values."""
    second["lm_head.weight"] = first["lm_head.weight"] * -1.0


def stale_index(path: Path) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {HEAD: "gone.safetensors"}}))


SERVED: dict[str, tuple[str, Edit]] = {
    "tied, another head stored": ("qwen3", tensors(other_head)),
    "tied, a copy stored": ("qwen3", tensors(lambda t: t.update({HEAD: t[EMBED].clone()}))),
    "tied, only the head stored": ("qwen3", tensors(head_only)),
    "tied by the configuration alone": ("llama", config(tie_word_embeddings=True)),
    "tied by the configuration alone, no head": (
        "llama",
        both(config(tie_word_embeddings=True), tensors(lambda t: t.pop(HEAD))),
    ),
    "tied is not said": ("llama", config(tie_word_embeddings=None)),
    "dtype is not said, the file is bfloat16": (
        "llama",
        both(config(dtype=None), tensors(to(torch.bfloat16))),
    ),
    "dtype is not said, the file is float16": ("llama", both(config(dtype=None), tensors(to(torch.float16)))),
    "dtype float32, the file is bfloat16": ("llama", tensors(to(torch.bfloat16))),
    "dtype bfloat16, the file is float32": ("llama", config(dtype="bfloat16")),
    "dtype by its old name": ("llama", config(dtype=None, torch_dtype="bfloat16")),
    "one norm of another type": (
        "llama",
        tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()})),
    ),
    "head_dim is not said": ("llama", config(head_dim=None)),
    "key-value heads are not said": ("llama-no-grouping", config(num_key_value_heads=None)),
    "rope_theta at the top": ("llama", config(rope_parameters=None, rope_theta=5e5)),
    "rope parameters are not said": ("llama", config(rope_parameters=None)),
    "rope_theta twice": ("llama", config(rope_theta=5e5)),
    "an attention bias that Mistral does not heed": ("mistral", config(attention_bias=True)),
    "biases that Qwen2 does not heed": ("qwen2", config(attention_bias=True, mlp_bias=True)),
    "a window that Qwen2 does not use": ("qwen2", config(sliding_window=2)),
    "a window that Llama does not know": ("llama", config(sliding_window=2)),
    "a tensor in two shards": ("llama", shards(twice)),
    "a tensor in another shard than the index says": (
        "llama",
        shards(lambda first, second: second.update({HEAD: first.pop(HEAD)})),
    ),
    "a whole file beside a stale index": ("llama", stale_index),
    "an unknown field": ("llama", config(flux_capacitor=3)),
}


@pytest.mark.parametrize("case", SERVED)
def test_a_checkpoint_is_served_as_transformers_decides(tmp_path: Path, case: str) -> None:
    variant, edit = SERVED[case]
    edit(save(build(variant), tmp_path))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    decoder = Decoder.load(tmp_path)
    assert decoder.dtype == expected.dtype
    tolerance = 1e-4 if expected.dtype == torch.float32 else 0.1
    torch.testing.assert_close(
        run(decoder, IDS),
        reference_logits(expected, IDS),
        rtol=0.02 if tolerance > 0.01 else 0,
        atol=tolerance,
    )


REFUSED: dict[str, tuple[str, Edit, str]] = {
    "untied, the head is missing": ("llama", tensors(lambda t: t.pop(HEAD)), "lacks 1 tensors.*lm_head"),
    "neither embedding nor head": (
        "qwen3",
        tensors(lambda t: t.pop(EMBED)),
        "lacks 1 tensors, the first is model.embed_tokens",
    ),
    "another vocabulary": ("llama", config(vocab_size=98), r"shape \[97, 64\].*\[98, 64\]"),
    "another head_dim": ("llama", config(head_dim=32), "has shape"),
    "more key-value heads": ("llama", config(num_key_value_heads=4), "k_proj.*has shape"),
    "heads that do not divide": (
        "llama",
        config(num_key_value_heads=3),
        "multiple of num_key_value_heads, 3",
    ),
    "no heads": ("llama", config(num_key_value_heads=0), "num_key_value_heads is 0"),
    "an odd head_dim": ("llama", config(head_dim=15), "head_dim.*15"),
    "fewer layers": ("llama", config(num_hidden_layers=2), "does not use, the first is model.layers.2"),
    "more layers": ("llama", config(num_hidden_layers=4), "lacks 9 tensors, the first is model.layers.3"),
    "biases that are not there": ("llama", config(attention_bias=True), "lacks .*bias"),
    "biases that are not used": (
        "llama",
        tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(112)})),
        "does not use.*up_proj.bias",
    ),
    "whole numbers": (
        "llama",
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})),
        "model.norm.weight .* type I8",
    ),
    "a shard that is gone": (
        "llama",
        shards(lambda *_: None, weight_map={HEAD: "gone.safetensors"}),
        "cannot read .*gone.safetensors",
    ),
    "an index of another shape": ("llama", shards(lambda *_: None, weight_map=[HEAD]), "weight_map"),
    "a tensor that the index promises": (
        "llama",
        shards(lambda first, _: first.pop(HEAD)),
        "lacks .*lm_head",
    ),
    "another class than its type": ("llama", config(model_type="mistral"), "model_type 'mistral'"),
    "layer types, which make a Mistral another": (
        "mistral-window",
        config(layer_types=["full_attention"] * 3),
        "model_type 'ministral'",
    ),
    "weights elsewhere": ("llama", config(transformers_weights="other.safetensors"), "other.safetensors"),
    "too few layer types": ("qwen2", config(layer_types=["full_attention"]), "layer_types|not valid"),
    "layers without experts": ("qwen3-moe", config(mlp_only_layers=[1]), r"mlp_only_layers is \[1\]"),
    "more experts for a token than there are": (
        "mixtral",
        config(num_experts_per_tok=5),
        "num_experts_per_tok is 5; it must be from 1 to 4",
    ),
    "a limit of nothing": ("gpt-oss", config(swiglu_limit=0), "swiglu_limit is 0.*above 0|not valid"),
    "fewer experts": ("qwen3-moe", config(num_local_experts=7, num_experts=7), "has shape|does not use"),
    "attention to both sides": (
        "gemma2",
        config(use_bidirectional_attention=True),
        "use_bidirectional_attention is set",
    ),
    "rotary positions for too few layers": (
        "smollm3",
        config(no_rope_layers=[1]),
        "no_rope_layers|not valid",
    ),
    "a part of a head that is not even": (
        "phi3-partial",
        config(partial_rotary_factor=0.7, rope_parameters=None),
        "partial_rotary_factor is 0.7",
    ),
    "end tokens that are none": ("llama", config(eos_token_id="</s>"), "eos_token_id|not valid"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_contradicts_itself_is_refused(tmp_path: Path, case: str) -> None:
    variant, edit, reason = REFUSED[case]
    edit(save(build(variant), tmp_path))
    with pytest.raises(ValueError, match=reason):
        Decoder.load(tmp_path)


@pytest.mark.parametrize(
    ("stated", "generation", "expected"),
    [
        (5, None, (5,)),
        (5, {"eos_token_id": [7, 9]}, (7, 9)),
        (5, {"eos_token_id": 0}, (0,)),
        (5, {"temperature": 0.5}, (5,)),
        (5, {"eos_token_id": None}, (5,)),
        (None, None, ()),
        ([5, 97, -1], None, (5,)),
    ],
)
def test_end_tokens_are_those_of_the_generation_configuration_if_it_has_any(
    tmp_path: Path, stated: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "eos_token_id": stated, **SHAPE}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert ModelConfig.from_checkpoint(tmp_path).eos_token_ids == expected


def test_a_deep_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        ModelConfig.from_checkpoint(tmp_path)
