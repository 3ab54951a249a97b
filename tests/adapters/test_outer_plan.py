"""What is outside the projections and would not give what PEFT gives is refused by key or option."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.fixtures import HIDDEN, SHAPES, make_tensors, tiny_llama, write_adapter
from toppings.adapters.base_weights import BaseWeights
from toppings.adapters.checkpoint import read_checkpoint
from toppings.adapters.errors import AdapterError
from toppings.adapters.packed import pack_weights

VOCAB = 64
HEAD, EMBED = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
TOKENS = f"{EMBED}.token_adapter.trainable_tokens_delta"
Q_HEAD, Q_EMBED = ["q_proj", "lm_head"], ["q_proj", "embed_tokens"]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseWeights:
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return BaseWeights(path, "float32")


def read(path: Path, base: BaseWeights, more: Tensors, **config: Any) -> Any:
    write_adapter(path, tensors={**make_tensors(), **more}, **config)
    return read_checkpoint(path, SHAPES, base=base)


def head(rank: int = 4) -> Tensors:
    return {
        f"{HEAD}.lora_A.weight": torch.randn(rank, HIDDEN),
        f"{HEAD}.lora_B.weight": torch.randn(VOCAB, rank),
    }


def embed() -> Tensors:
    a, b = torch.randn(4, VOCAB), torch.randn(HIDDEN, 4)
    return {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}


@pytest.mark.parametrize(
    ("more", "config", "reason"),
    [
        ({}, {"target_modules": Q_HEAD}, "matches lm_head, but the file has no weights"),
        (head(), {}, "lm_head.lora_A.weight' is not among the modules"),
        (head(5), {"target_modules": Q_HEAD}, r"has shape \[5, 32\].*need \[4, 32\]"),
        ({f"{HEAD}.lora_A.weight": torch.zeros(4, HIDDEN)}, {"target_modules": Q_HEAD}, "no lora_B.weight"),
        (
            {**head(), f"{HEAD}.weight": torch.zeros(VOCAB, HIDDEN)},
            {"target_modules": Q_HEAD},
            "beside a LoRA",
        ),
        (
            {**head(), f"{HEAD}.lora_B.bias": torch.zeros(VOCAB)},
            {"target_modules": Q_HEAD},
            "bias' is of no use",
        ),
        (embed(), {"target_modules": Q_EMBED, "lora_bias": True}, "lora_bias"),
        ({}, {"modules_to_save": ["lm_head"]}, "names lm_head, but the file has no weight"),
        ({}, {"modules_to_save": ["q_proj"]}, "q_proj cannot be replaced"),
        (
            {f"{HEAD}.weight": torch.zeros(VOCAB + 8, HIDDEN)},
            {},
            "72 tokens, 8 more than the base model, and no weights of model.embed_tokens",
        ),
        ({f"{HEAD}.weight": torch.zeros(VOCAB - 8, HIDDEN)}, {}, "56 rows; the base model has 64 tokens"),
        ({TOKENS: torch.zeros(2, HIDDEN)}, {"trainable_token_indices": [3, 2**31 - 1]}, "at most 65536"),
        ({f"{HEAD}.weight": torch.zeros(VOCAB, HIDDEN, dtype=torch.int32)}, {}, "I32.*must be|float"),
        ({f"{HEAD}.weight": torch.full((VOCAB, HIDDEN), float("inf"))}, {}, "NaN or infinite"),
        ({}, {"trainable_token_indices": [3]}, "trainable_token_indices names model.embed_tokens"),
        ({TOKENS: torch.zeros(2, HIDDEN)}, {}, "trainable_token_indices does not name"),
        (
            {TOKENS: torch.zeros(2, HIDDEN)},
            {"trainable_token_indices": [3, 64]},
            "65 tokens, 1 more .*of lm_head",
        ),
        ({TOKENS: torch.zeros(2, HIDDEN)}, {"trainable_token_indices": [3, 3]}, "a token twice"),
        ({TOKENS: torch.zeros(3, HIDDEN)}, {"trainable_token_indices": [3, 4]}, r"need \[2, 32\]"),
        ({}, {"trainable_token_indices": ["x"]}, "trainable_token_indices is"),
        ({}, {"trainable_token_indices": {"norm": [1]}}, "names 'norm'; it must be embed_tokens"),
        ({}, {"ensure_weight_tying": "yes"}, "ensure_weight_tying is 'yes'"),
    ],
)
def test_it_is_refused_with_the_reason(
    base: BaseWeights, tmp_path: Path, more: Tensors, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(AdapterError, match=reason):
        read(tmp_path, base, more, **config)


def test_what_names_nothing_is_told(base: BaseWeights, tmp_path: Path) -> None:
    checkpoint = read(tmp_path, base, {}, modules_to_save=["classifier"])
    assert any("'classifier', which is not in the base model" in warning for warning in checkpoint.warnings)


def test_a_copy_of_the_base_models_weight_beside_a_lora_takes_no_room(
    base: BaseWeights, tmp_path: Path
) -> None:
    """PEFT saves it with every LoRA on an end of the model, and loads it again."""
    with base.open() as weights:
        same = weights.weight("lm_head")
    for own, names in (
        (same, {"lm_head.A", "lm_head.B"}),
        (same + 1, {"lm_head.A", "lm_head.B", "lm_head.weight"}),
    ):
        more = {**head(), f"{HEAD}.base_layer.weight": own}
        checkpoint = read(tmp_path, base, more, target_modules=Q_HEAD)
        assert checkpoint.extras(SHAPES.num_layers - 1).keys() == names


def test_ids_are_kept_bit_by_bit_whatever_the_type(base: BaseWeights, tmp_path: Path) -> None:
    rows = torch.arange(3.0)[:, None].expand(3, HIDDEN).contiguous()
    checkpoint = read(tmp_path, base, {TOKENS: rows}, trainable_token_indices=[61, 2, 40])
    for dtype in ("bfloat16", "float32"):
        layout, blocks = pack_weights(checkpoint, dtype)
        ids, found = (layout.layers[0].find_extra(f"embed_tokens.{name}") for name in ("ids", "rows"))
        assert ids is not None
        assert found is not None
        (ids_at, (num,)), (rows_at, shape) = ids, found
        assert blocks[ids_at : ids_at + num].view(torch.int32).tolist() == [2, 40, 61]
        assert blocks[rows_at : rows_at + 3 * HIDDEN].view(shape)[:, 0].tolist() == [1, 2, 0]
