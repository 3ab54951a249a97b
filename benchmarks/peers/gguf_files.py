"""A Llama checkpoint and its PEFT adapters as llama.cpp reads them.

Rows of the query and key projections are in another order there: a head's dimensions i and i + d/2, which
rotary positions turn together, lie side by side.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.torch import load_file
from torch import Tensor

PROJECTIONS = {
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ADAPTED = "base_model.model."


def write_model(path: Path, checkpoint: Path, kind: str) -> None:
    """`kind`: the type of the matrices (F16, BF16, Q8_0); norms are in fp32. Without a tokeniser: prompts are
    token ids. Raises ValueError for a model that is no plain Llama."""
    config = json.loads((checkpoint / "config.json").read_text())
    with _writer(path) as writer:
        _write_shape(writer, config)
        for file in sorted(checkpoint.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                if name == "lm_head.weight" and config["tie_word_embeddings"]:
                    continue
                place = _place(name.removesuffix(".weight"))
                _add(writer, f"{place}.weight", _in_order(tensor, place, config), kind)


def write_adapter(path: Path, adapter: Path, checkpoint: Path) -> None:
    """A LoRA, in fp16."""
    config = json.loads((checkpoint / "config.json").read_text())
    lora = json.loads((adapter / "adapter_config.json").read_text())
    with _writer(path) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(lora["lora_alpha"]))
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
            module, letter = name.removeprefix(ADAPTED).removesuffix(".weight").rsplit(".lora_", 1)
            place = _place(module)
            matrix = _in_order(tensor, place, config) if letter == "B" else tensor
            _add(writer, f"{place}.weight.lora_{letter.lower()}", matrix, "F16")


@contextmanager
def _writer(path: Path) -> Iterator[Any]:
    writer = GGUFWriter(path, "llama")
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: Any, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if config["model_type"] != "llama" or rope.get("rope_type", "default") != "default":
        raise ValueError(f"a GGUF is made of plain Llamas only, not of {config['model_type']} with {rope}")
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _place(module: str) -> str:
    """Of a module of transformers' Llama."""
    if module in OUTSIDE:
        return OUTSIDE[module]
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{(PROJECTIONS | NORMS)[rest]}"


def _in_order(tensor: Tensor, place: str, config: dict[str, Any]) -> Tensor:
    """With the rows of queries and keys as they are in a GGUF."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    num_heads = heads.get(place.rpartition(".")[2])
    if num_heads is None:
        return tensor
    halves = tensor.view(num_heads, 2, tensor.shape[0] // num_heads // 2, tensor.shape[1])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _add(writer: Any, name: str, tensor: Tensor, kind: str) -> None:
    values: np.ndarray[Any, Any] = tensor.to(torch.float32).numpy()
    stored = GGMLQuantizationType.F32 if values.ndim == 1 else GGMLQuantizationType[kind]
    writer.add_tensor(name, quantize(values, stored), raw_dtype=stored)
