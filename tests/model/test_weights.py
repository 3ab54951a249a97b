import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.checkpoints import build, reference_logits, run, save
from toppings.model.config import ModelConfig
from toppings.model.decoder import Decoder
from toppings.model.weights import read_weights

FILE = "model.safetensors"


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrites the checkpoint's tensors."""
    tensors = load_file(path / FILE)
    edit(tensors)
    save_file(tensors, path / FILE, metadata={"format": "pt"})
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(build("llama"), tmp_path)


def test_sharded_checkpoints_read_like_whole_ones(tmp_path: Path) -> None:
    model = build("qwen2")
    save(model, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    logits = run(Decoder.load(tmp_path), [1, 2, 3])
    torch.testing.assert_close(logits, reference_logits(model, [1, 2, 3]), rtol=0, atol=1e-4)


def test_projections_of_a_group_are_fused_in_order(checkpoint: Path) -> None:
    weights = read_weights(checkpoint, ModelConfig.from_checkpoint(checkpoint), torch.float32)
    source = load_file(checkpoint / FILE)
    parts = [source[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(weights["layers.1.qkv.weight"], torch.cat(parts))


def test_weights_are_converted_to_the_wanted_dtype(checkpoint: Path) -> None:
    weights = read_weights(checkpoint, ModelConfig.from_checkpoint(checkpoint), torch.bfloat16)
    source = load_file(checkpoint / FILE)
    assert torch.equal(weights["embed"], source["model.embed_tokens.weight"].bfloat16())


def test_a_stored_copy_of_tied_embeddings_is_accepted(tmp_path: Path) -> None:
    save(build("llama-tied-biases"), tmp_path)
    change(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head" not in read_weights(tmp_path, ModelConfig.from_checkpoint(tmp_path), torch.float32)


def test_rotary_buffers_of_old_checkpoints_are_skipped(checkpoint: Path) -> None:
    change(checkpoint, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    Decoder.load(checkpoint)


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    change(checkpoint, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 tensors, the first is model\.layers\.2\.mlp\.up_proj"):
        Decoder.load(checkpoint)


def test_a_surplus_tensor_is_named(checkpoint: Path) -> None:
    change(checkpoint, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    with pytest.raises(
        ValueError, match=r"does not use, the first is model\.layers\.0\.self_attn\.q_proj\.bias"
    ):
        Decoder.load(checkpoint)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(checkpoint: Path) -> None:
    change(checkpoint, lambda t: t.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight .*shape \[63\].*\[64\]"):
        Decoder.load(checkpoint)


def test_a_truncated_file_is_named(checkpoint: Path) -> None:
    content = (checkpoint / FILE).read_bytes()
    (checkpoint / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot read .*model\.safetensors"):
        Decoder.load(checkpoint)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save(build("llama"), tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = next(iter(index["weight_map"].values()))
    (tmp_path / shard).unlink()
    with pytest.raises(ValueError, match=f"cannot read .*{shard}"):
        Decoder.load(tmp_path)


def test_pickled_weights_are_refused(checkpoint: Path) -> None:
    (checkpoint / FILE).unlink()
    torch.save({}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled"):
        Decoder.load(checkpoint)


def test_a_checkpoint_without_weights_is_named(checkpoint: Path) -> None:
    (checkpoint / FILE).unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        Decoder.load(checkpoint)
