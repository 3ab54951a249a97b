import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.adapters.fixtures import (
    HIDDEN,
    SHAPES,
    make_peft,
    make_tensors,
    tensor_key,
    tiny_llama,
    write_adapter,
)
from toppings.adapters import peft_matches
from toppings.adapters.checkpoint import read_checkpoint
from toppings.adapters.checkpoint_plan import module_name
from toppings.adapters.errors import AdapterError, AdapterNotFound
from toppings.adapters.layout import BaseShapes
from toppings.adapters.packed import pack_weights
from toppings.adapters.peft_matches import MAX_DIRECT_CHARS
from toppings.core import MODULES, ExpertNames, Mixture
from toppings.sandbox.patterns import match_all

MIXTURE = Mixture(4, 2, ExpertNames())
KINDS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.(0|2)\.(self_attn\.[kv]_proj|mlp\.up_proj)"},
    "full path": {"target_modules": ["model.layers.1.self_attn.o_proj"]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "0.self_attn.q_proj"]},
    "rslora": {"target_modules": ["gate_proj"], "use_rslora": True, "r": 16},
    "rank 1": {"target_modules": ["q_proj"], "r": 1, "lora_alpha": 3},
    "rank 512": {"target_modules": ["q_proj"], "r": 512},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "one layer by pattern": {
        "target_modules": ["v_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"layers\.[02]\.mlp\.up_proj": 7, "k_proj": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1, "up_proj": 40, ".*k_proj": 5},
        "use_rslora": True,
    },
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_give_the_delta_that_peft_computes(tmp_path: Path, kind: str) -> None:
    settings = {k: v for k, v in KINDS[kind].items() if k != "init_lora_weights"}
    model = make_peft(tmp_path, **settings)
    if "init_lora_weights" in KINDS[kind]:
        edit_config(tmp_path, init_lora_weights=KINDS[kind]["init_lora_weights"])
    layout, blocks = pack_weights(read_checkpoint(tmp_path, SHAPES), "float32")
    targeted = dict(model.base_model.model.named_modules())
    for index, layer in enumerate(layout.layers):
        start = layout.layer_offset_bytes(index) // 4
        for m in range(len(MODULES)):
            module = targeted[module_name(index, m)]
            assert (layer.ranks[m] > 0) == hasattr(module, "lora_A")
            if layer.ranks[m]:
                (size_in, size_out), rank = SHAPES.sizes[m], layer.ranks[m]
                a = blocks[start + layer.a_offsets[m] :][: rank * size_in].view(rank, size_in)
                b = blocks[start + layer.b_offsets[m] :][: rank * size_out].view(rank, size_out)
                torch.testing.assert_close(b.T @ a, module.get_delta_weight("default"))


def edit_config(path: Path, **fields: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "lora_bias is not supported for DoRA"),
        ({"init_lora_weights": "gaussian"}, "lora_bias goes with init_lora_weights true or false.*gaussian"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": None}, "lora_bias goes with init_lora_weights true or false.*None"),
    ],
)
def test_what_peft_refuses_to_configure_with_lora_bias_is_refused(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match="lora_bias=True is"):
        LoraConfig(lora_bias=True, **options)
    with pytest.raises(AdapterError, match=reason):
        read_checkpoint(write_adapter(tmp_path, lora_bias=True, **options), SHAPES)


def test_an_activated_dora_is_refused_as_peft_refuses_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"use_dora": True, "alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}
    config = LoraConfig(target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match="variant combination"):
        get_peft_model(tiny_llama(), config)
    with pytest.raises(AdapterError, match="alora_invocation_tokens is not supported for DoRA"):
        read_checkpoint(write_adapter(tmp_path, **options), SHAPES)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("peft_type", "IA3", "IA3.*one of LORA"),
        ("peft_type", None, "peft_type"),
        ("use_dora", True, "has no lora_magnitude_vector"),
        ("use_dora", 1, "use_dora is 1"),
        ("alora_invocation_tokens", [1, 2], "task_type is None.*CAUSAL_LM"),
        ("alora_invocation_tokens", [], "a list of 1 to 256 token ids"),
        ("alora_invocation_tokens", [1, True], "a list of 1 to 256 token ids"),
        ("alora_invocation_tokens", [-1], "a list of 1 to 256 token ids"),
        ("alora_invocation_tokens", [3] * 257, "a list of 1 to 256 token ids"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("bias", "some", "bias is 'some'.*none, all, lora_only"),
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("monteclora_config", {"num_samples": 2}, "MonteCLoRA"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
        ("megatron_config", {"a": 1}, "Megatron"),
        ("init_lora_weights", "brand_new_init", "brand_new_init.*gaussian"),
        ("layers_pattern", "layers", "needs layers_to_transform"),
        ("target_modules", r".*(q_proj|lm_head)", "lm_head.*checkpoint"),
        ("target_modules", "q" * 5000, "5000 characters"),
        ("rank_pattern", {f"layer{i}": 4 for i in range(9000)}, "9000 entries"),
        ("alpha_pattern", {"(?P<x>q": 4}, "not a valid pattern"),
        ("rank_pattern", {"a{1,99999999999}": 4}, "not a valid pattern"),
        ("layer_replication", [[0, 2]], "layer_replication"),
        ("lora_bias", True, "has no lora_B.bias beside it"),
        ("use_qalora", True, "use_qalora"),
        ("target_parameters", ["experts.w"], "target_parameters"),
        ("trainable_token_indices", [3], "trainable_token_indices"),
        ("kasa_config", {"beta": 1}, "kasa_config"),
        ("init_lora_weights", "pissa_niter_4", "base model's weights"),
        ("init_lora_weights", "olora", "base model's checkpoint"),
        ("init_lora_weights", "loftq", "base model's weights"),
        ("r", 0, "r is 0"),
        ("r", 513, "513"),
        ("r", "8", "'8'"),
        ("r", True, "True"),
        ("rank_pattern", {"q_proj": 600}, "600"),
        ("alpha_pattern", {"q_proj(": 4}, "q_proj\\("),
        ("alpha_pattern", [4], "alpha_pattern"),
        ("lora_alpha", "big", "lora_alpha"),
        ("lora_alpha", float("nan"), "nan"),
        ("lora_alpha", 10**400, "lora_alpha"),
        ("use_rslora", "yes", "use_rslora"),
        ("target_modules", None, "target_modules"),
        ("target_modules", [], "target_modules"),
        ("target_modules", ["q_proj", "lm_head"], "lm_head"),
        ("target_modules", "[", "not a valid pattern"),
        ("target_modules", ["k_proj"], "q_proj.*not among"),
        ("target_modules", ["q_proj", "k_proj"], "k_proj"),
        ("target_modules", r".*layers\.0\..*q_proj", "layers.1.self_attn.q_proj"),
        ("exclude_modules", ["q_proj"], "q_proj"),
        ("layers_to_transform", [0, 1], "layers.2.self_attn.q_proj"),
        ("layers_to_transform", "0", "layers_to_transform"),
    ],
)
def test_configuration_is_refused_with_the_reason(
    tmp_path: Path, option: str, value: Any, reason: str
) -> None:
    write_adapter(tmp_path, **{option: value})
    with pytest.raises(AdapterError, match=reason):
        read_checkpoint(tmp_path, SHAPES)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("init_lora_weights", value) for value in (True, False, "gaussian", "eva", "orthogonal")),
        *(("lora_dropout", 0.3), ("corda_config", {"corda_method": "kpm"}), ("eva_config", {"rho": 2.0})),
        *(("loftq_config", {"loftq_bits": 4}), ("task_type", "CAUSAL_LM"), ("revision", "main")),
        *(("brand_new_option", None), ("brand_new_option", False), ("lora_alpha", 0.5)),
        *(("target_modules", ["q_proj", "c_attn"]), ("rank_pattern", {"down_proj": 2})),
    ],
)
def test_option_that_changes_no_result_is_accepted(tmp_path: Path, option: str, value: Any) -> None:
    checkpoint = read_checkpoint(write_adapter(tmp_path, **{option: value}), SHAPES)
    assert set(checkpoint.weights) == {(layer, 0) for layer in range(SHAPES.num_layers)}


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Weights with "layer/module/half" or full keys replaced, added or (None) left out."""
    tensors = make_tensors()
    for key, tensor in changes.items():
        parts = key.split("/")
        full_key = tensor_key(int(parts[0]), parts[1], parts[2]) if len(parts) == 3 else key
        tensors.pop(full_key, None)
        if tensor is not None:
            tensors[full_key] = tensor
    return tensors


def with_value(value: float) -> torch.Tensor:
    tensor = torch.zeros(4, HIDDEN)
    tensor[2, 3] = value
    return tensor


PREFIX = "base_model.model.model.layers.0."


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"0/q_proj/B": None}, "layers.0.self_attn.q_proj.lora_A.weight' has no lora_B"),
        ({"1/q_proj/A": None}, "layers.1.self_attn.q_proj.lora_B.weight' has no lora_A"),
        ({"2/q_proj/A": None, "2/q_proj/B": None}, "layers.2.self_attn.q_proj, but the file has no weights"),
        ({"3/q_proj/A": torch.zeros(4, HIDDEN)}, "layer 3; the base model has 3 layers"),
        ({"0/k_proj/A": torch.zeros(4, HIDDEN), "0/k_proj/B": torch.zeros(16, 4)}, "k_proj.*not among"),
        ({f"{PREFIX}mlp.q_proj.lora_A.weight": torch.zeros(4, HIDDEN)}, "mlp.q_proj"),
        ({f"{PREFIX}self_attn.qkv_proj.lora_A.weight": torch.zeros(4, HIDDEN)}, "qkv_proj.*matches no"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, HIDDEN)}, "matches no"),
        ({f"{PREFIX}self_attn.q_proj.lora_magnitude_vector": torch.zeros(HIDDEN)}, "use_dora is not set"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 64)}, "embedding"),
        ({"base_model.model.lm_head.weight": torch.zeros(64, HIDDEN)}, "lm_head"),
        ({f"{PREFIX}self_attn.q_proj.lora_B.bias": torch.zeros(HIDDEN)}, "lora_bias is not set"),
        ({f"{PREFIX}input_layernorm.weight": torch.zeros(HIDDEN)}, "input_layernorm.*checkpoint"),
        ({f"base_model.model.model.layers.{'9' * 5000}.mlp.up_proj.lora_A.weight": torch.zeros(1)}, "99999"),
        ({f"{PREFIX}self_attn.q_proj.lora_A.default.weight": torch.zeros(4, HIDDEN)}, "are the same weight"),
        ({f"{PREFIX}self_attn.q_proj.lora_A.other.weight": torch.zeros(4, HIDDEN)}, "matches no"),
        ({f"{PREFIX}self_attn.q_proj.base_layer.weight": torch.zeros(4, HIDDEN)}, "whole weight"),
        ({f"{PREFIX}self_attn.k_norm.weight": torch.zeros(4)}, "k_norm.*checkpoint"),
        ({"base_model.model.model.norm.weight": torch.zeros(HIDDEN)}, "norm.*checkpoint"),
        ({f"{PREFIX}self_attn.q_proj.base_layer.bias": torch.zeros(HIDDEN)}, "whole weight"),
        ({"0/q_proj/A": torch.zeros(5, HIDDEN)}, r"has shape \[5, 32\].*need \[4, 32\]"),
        ({"0/q_proj/A": torch.zeros(4, HIDDEN * 2)}, r"\[4, 64\].*need \[4, 32\]"),
        ({"0/q_proj/B": torch.zeros(4, HIDDEN)}, r"\[4, 32\].*need \[32, 4\]"),
        ({"0/q_proj/A": torch.zeros(4 * HIDDEN)}, "has shape"),
        ({"0/q_proj/A": torch.zeros(4, HIDDEN, dtype=torch.int32)}, "int32"),
        ({"0/q_proj/A": with_value(float("nan"))}, "NaN"),
        ({"0/q_proj/A": with_value(float("-inf"))}, "NaN or infinite"),
    ],
)
def test_weights_are_refused_with_the_key(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], reason: str
) -> None:
    write_adapter(tmp_path, tensors=changed(**changes))
    with pytest.raises(AdapterError, match=reason):
        read_checkpoint(tmp_path, SHAPES)


@pytest.mark.parametrize(
    ("key", "shapes", "reason"),
    [
        ("mlp.experts.4.gate_proj", (False, MIXTURE), "of no expert.*that the configuration targets"),
        ("mlp.experts.3.gate_proj", (False, MIXTURE), "of no expert.*that the configuration targets"),
        ("mlp.gate_proj", (False, MIXTURE), r"matches no .*\(q_proj, k_proj, v_proj, o_proj\)"),
        (
            "self_attn.q_proj",
            (True, None),
            r"matches no .*\(qkv_proj, o_proj, gate_up_proj, down_proj\)",
        ),
    ],
)
def test_modules_that_the_base_model_has_not_are_told_with_those_that_it_has(
    tmp_path: Path, key: str, shapes: tuple[bool, Mixture | None], reason: str
) -> None:
    name = f"{PREFIX}{key}.lora_A.weight"
    write_adapter(tmp_path, tensors={name: torch.zeros(4, HIDDEN)})
    with pytest.raises(AdapterError, match=reason):
        read_checkpoint(tmp_path, BaseShapes(SHAPES.num_layers, SHAPES.sizes, *shapes))


def test_adapter_of_another_base_model_is_refused(tmp_path: Path) -> None:
    other = BaseShapes(SHAPES.num_layers, tuple((a * 2, b * 2) for a, b in SHAPES.sizes))
    write_adapter(tmp_path, shapes=other)
    with pytest.raises(AdapterError, match=r"has shape \[4, 64\]; the base model"):
        read_checkpoint(tmp_path, SHAPES)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file_is_named(tmp_path: Path, file: str) -> None:
    (write_adapter(tmp_path) / file).unlink()
    with pytest.raises(AdapterError, match=f"{file} is missing"):
        read_checkpoint(tmp_path, SHAPES)


def test_missing_directory_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere", SHAPES)


def test_pickle_is_refused_unread(tmp_path: Path) -> None:
    (write_adapter(tmp_path) / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"adapter_model.bin is a pickle"):
        read_checkpoint(tmp_path, SHAPES)


@pytest.mark.parametrize("num_bytes", [0, 5, 100, 2000])
def test_truncated_weights_are_refused(tmp_path: Path, num_bytes: int) -> None:
    file = write_adapter(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(AdapterError, match="truncated or corrupt"):
        read_checkpoint(tmp_path, SHAPES)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000, "\xff"])
def test_malformed_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (write_adapter(tmp_path) / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match=r"adapter_config.json"):
        read_checkpoint(tmp_path, SHAPES)


BACKTRACKS = r"(?:(?:\w+\.?)+)+!"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": BACKTRACKS},
        {"exclude_modules": BACKTRACKS},
        {"rank_pattern": {BACKTRACKS: 4}},
        {"alpha_pattern": {BACKTRACKS: 4}},
        {"layers_pattern": [BACKTRACKS], "layers_to_transform": [0]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_pattern_that_backtracks_for_ever_is_refused_by_its_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr(peft_matches, "PATTERN_CPU_S", 0.2)
    write_adapter(tmp_path, **fields)
    with pytest.raises(AdapterError, match=f"{next(iter(fields))}.*longer than 0.2 s to match"):
        read_checkpoint(tmp_path, SHAPES)


def test_long_patterns_are_matched_within_bounds_of_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even those that cannot backtrack take seconds to compile, and hold the interpreter as long."""
    in_place: list[int] = []

    def counted(patterns: list[str], names: list[str], *, is_full: bool = False) -> Any:
        in_place.append(sum(map(len, patterns)))
        return match_all(patterns, names, is_full=is_full)

    monkeypatch.setattr(peft_matches, "match_all", counted)
    pattern = {f"{i:04}" + "x" * 400: 4 for i in range(1000)}
    assert read_outcome(tmp_path, pattern) in ("served", "too long")
    assert sum(in_place) <= MAX_DIRECT_CHARS
    assert "patterns; at most" in read_outcome(tmp_path, {f"{i:04}" + "x" * 4000: 4 for i in range(1000)})


def read_outcome(path: Path, rank_pattern: dict[str, int]) -> str:
    """`too long`: for its patterns, on a machine that is slow or busy."""
    try:
        read_checkpoint(write_adapter(path, rank_pattern=rank_pattern), SHAPES)
    except AdapterError as error:
        is_slow = "longer than" in str(error) or "no answer in time" in str(error)
        return "too long" if is_slow else str(error)
    return "served"


def header_file(path: Path, header: bytes, num_bytes: int) -> None:
    """A sparse weights file of `num_bytes` after this header."""
    with open(path / "adapter_model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + num_bytes)


def entry(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


@pytest.mark.parametrize(
    ("header", "num_bytes", "reason"),
    [
        (entry([4, 32], [0, 512]), 1 << 40, "do not fill the 1099511627776 bytes"),
        (entry([4, 32], [0, 600]), 600, "another size"),
        (entry([4, 32], [88, 600]), 600, "do not fill"),
        (entry([10**30], [0, 4 * 10**30]), 512, "whole numbers from 0 to"),
        (entry([2**48], [0, 4]), 4, "whole numbers from 0 to"),
        (entry([10**3990 + 7] * 1000, [0, 4]), 4, "1000 dimensions; at most 8"),
        (entry([1] * 9, [0, 4]), 4, "9 dimensions; at most 8"),
        (entry([-4, -32], [0, 512]), 512, "whole numbers"),
        (entry([True], [0, 4]), 4, "whole numbers"),
        (entry([4], [4, 0]), 4, "whole numbers"),
        (b'{"x": ' + b"[" * 100_000, 4, "not valid"),
        (b'{"x": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}', 4, "not valid"),
        (b"[]", 4, "not valid"),
        (b'{"x": 3}', 4, "not valid"),
        (b"\xff\xff", 4, "not valid"),
        (b" " * (5 << 20), 4, "claims 5242880 bytes"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused_unread(
    tmp_path: Path, header: bytes, num_bytes: int, reason: str
) -> None:
    header_file(write_adapter(tmp_path), header, num_bytes)
    with pytest.raises(AdapterError, match=f"truncated or corrupt: .*{reason}"):
        read_checkpoint(tmp_path, SHAPES)


def test_tensors_of_another_base_are_refused_before_they_are_read(tmp_path: Path) -> None:
    name = tensor_key(0, "q_proj", "A")
    size = 1 << 40
    header = json.dumps(
        {name: {"dtype": "F32", "shape": [4, size // 16], "data_offsets": [0, size]}}
    ).encode()
    header_file(write_adapter(tmp_path), header, size)
    with pytest.raises(AdapterError, match=r"lora_B beside it|has shape"):
        read_checkpoint(tmp_path, SHAPES)


def test_a_gigantic_configuration_is_refused_unread(tmp_path: Path) -> None:
    os.truncate(write_adapter(tmp_path) / "adapter_config.json", 1 << 40)
    with pytest.raises(AdapterError, match=r"adapter_config.json is larger than"):
        read_checkpoint(tmp_path, SHAPES)


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="too long"):
        read_checkpoint(tmp_path / ("x" * 5000), SHAPES)


def test_deep_values_are_told_shortly(tmp_path: Path) -> None:
    file = write_adapter(tmp_path) / "adapter_config.json"
    deep = "[" * 900 + "1" + "]" * 900
    file.write_text(file.read_text().replace('"r": 4', f'"r": {deep}'))
    with pytest.raises(AdapterError, match=r"r is \[") as error:
        read_checkpoint(tmp_path, SHAPES)
    assert len(str(error.value)) < 500


def test_empty_weights_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, tensors={})
    with pytest.raises(AdapterError, match="holds no tensors"):
        read_checkpoint(tmp_path, SHAPES)


def test_digest_follows_configuration_and_weights(tmp_path: Path) -> None:
    digests = {
        read_checkpoint(write_adapter(tmp_path / "a"), SHAPES).digest,
        read_checkpoint(write_adapter(tmp_path / "b"), SHAPES).digest,
        read_checkpoint(write_adapter(tmp_path / "c", lora_alpha=9), SHAPES).digest,
        read_checkpoint(write_adapter(tmp_path / "d", seed=1), SHAPES).digest,
    }
    assert len(digests) == 3
