"""GGUF files: every type of tensor that is served, against the dequantisation of the format's own library."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, dequantize, quant_shape_to_byte_shape, quantize
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.waiting import wait_until
from toppings.model.config import ModelConfig
from toppings.model.gguf import GgufError, _write, convert_gguf, rope_parameters

HIDDEN, HEADS, KV_HEADS = 256, 4, 2
KINDS = {
    "attn_q": Kind.Q4_0,
    "attn_k": Kind.Q8_0,
    "attn_v": Kind.Q4_1,
    "attn_output": Kind.Q4_K,
    "ffn_gate": Kind.Q5_K,
    "ffn_up": Kind.Q6_K,
    "ffn_down": Kind.BF16,
}
PLACES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOKENS = [chr(i) for i in range(33, 127)] + ["Ġ", "ĠĠ", "ab", "<|end|>", "<|turn|>"]


def blocks(rng: np.random.Generator, kind: Kind, shape: tuple[int, int]) -> np.ndarray:
    """Weights as a file stores them; for kinds that the library does not write, random blocks of small
    scales."""
    try:
        stored: np.ndarray = quantize(rng.normal(size=shape).astype(np.float32) / 16, kind)
        return stored
    except NotImplementedError:
        stored = rng.integers(0, 256, quant_shape_to_byte_shape(shape, kind), np.uint8)
        blocks = stored.reshape(shape[0], shape[1] // 256, -1)
        scale = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
        if kind is Kind.Q6_K:
            blocks[..., -2:] = scale
        else:
            blocks[..., :2] = blocks[..., 2:4] = scale
        return stored


def write(
    path: Path,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    factors: np.ndarray | None = None,
    kinds: dict[str, Kind] = KINDS,
) -> dict[str, torch.Tensor]:
    """A model of one layer; its projections as floats, in the file's order of rows."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 2) + [3, 3])
    writer.add_token_merges(["a b", "Ġ Ġ"])
    writer.add_eos_token_id(len(TOKENS) - 2)
    writer.add_eot_token_id(len(TOKENS) - 1)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    floats = {}
    embedding = rng.normal(size=(len(TOKENS), HIDDEN))
    is_full = set(kinds.values()) == {Kind.F32}
    writer.add_tensor("token_embd.weight", embedding.astype(np.float32 if is_full else np.float16))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for norm in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{norm}.weight", np.ones(HIDDEN, np.float32))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    for name, kind in kinds.items():
        rows = HIDDEN // HEADS * KV_HEADS if name in ("attn_k", "attn_v") else HIDDEN
        stored = blocks(rng, kind, (rows, HIDDEN))
        writer.add_tensor(f"blk.0.{name}.weight", stored, raw_dtype=kind)
        floats[name] = torch.from_numpy(dequantize(stored, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return floats


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    root = tmp_path_factory.mktemp("gguf")
    floats = write(root / "model.gguf")
    convert_gguf(root / "model.gguf", root / "made" / "model")
    return root / "made" / "model", floats


def test_all_kinds_of_tensors_become_what_the_format_says(
    converted: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, floats = converted
    weights = load_file(path / "model.safetensors")
    config = ModelConfig.from_checkpoint(path)
    assert (config.num_layers, config.num_kv_heads, config.dtype) == (1, KV_HEADS, "bfloat16")
    # Rotary pairs lie side by side in the file, half a head apart in a checkpoint.
    for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
        shape = floats[name].shape
        floats[name] = floats[name].view(heads, -1, 2, HIDDEN).transpose(1, 2).reshape(shape)
    for name, expected in floats.items():
        found = weights[f"model.layers.0.{PLACES[name]}.weight"]
        assert torch.equal(found, expected.bfloat16()), name


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16])
def test_plain_floats_stay_what_they_are(tmp_path: Path, kind: Kind) -> None:
    floats = write(tmp_path / "m.gguf", kinds=dict.fromkeys(KINDS, kind))
    (tmp_path / "m").mkdir()
    _write(tmp_path / "m.gguf", tmp_path / "m")  # in this process, which has imported what it needs
    weights = load_file(tmp_path / "m" / "model.safetensors")
    dtype = torch.float32 if kind is Kind.F32 else torch.float16
    assert {each.dtype for each in weights.values()} == {dtype}
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], floats["ffn_up"].to(dtype))


def test_a_conversion_ends_with_who_began_it_and_the_next_one_clears_up(tmp_path: Path) -> None:
    """The file is a pipe in which nothing comes: a conversion that nobody ends waits for ever."""
    pipe, made = tmp_path / "m.gguf", tmp_path / "made"
    os.mkfifo(pipe)
    code = "import sys; from pathlib import Path; from toppings.model.gguf import convert_gguf; "
    code += "convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))"
    parent = subprocess.Popen([sys.executable, "-c", code, str(pipe), str(made / "m")])
    pipe.write_bytes(b"GGUF")  # all that the parent itself reads
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    wait_until(lambda: children.read_text().split())
    [child] = children.read_text().split()
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(child))
    assert list(made.iterdir()) != []
    pipe.unlink()
    pipe.write_bytes(b"GGUF")
    with pytest.raises(GgufError):
        convert_gguf(pipe, made / "m")
    assert list(made.iterdir()) == []


def is_running(pid: str) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_tokeniser_template_and_end_tokens_come_along(
    converted: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, _ = converted
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer.encode("a  1ab<|turn|>")
    assert [TOKENS[i] for i in ids] == ["a", "ĠĠ", "1", "ab", "<|turn|>"]  # blanks are apart from digits
    assert tokenizer.decode(ids) == "a  1ab<|turn|>"
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert set(ModelConfig.from_checkpoint(path).eos_token_ids) == {len(TOKENS) - 2, len(TOKENS) - 1}
    assert [each.name for each in path.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"architecture": "mamba"}, "'mamba'"), ({"pre": "unheard-of"}, "'unheard-of'")],
    ids=["architecture", "pre-tokeniser"],
)
def test_what_is_not_served_is_refused_by_name(
    tmp_path: Path, settings: dict[str, str], problem: str
) -> None:
    write(tmp_path / "m.gguf", **settings)  # type: ignore[arg-type]
    with pytest.raises(GgufError, match=problem):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "made" / "m")
    assert list((tmp_path / "made").iterdir()) == []


def test_other_files_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(GgufError, match="is no GGUF file"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "m")
    with pytest.raises(GgufError, match="No such file"):
        convert_gguf(tmp_path / "n.gguf", tmp_path / "m")


def test_factors_of_rotary_frequencies_are_llama_3s_or_refused() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta, head_dim = 500000.0, 128
    expected = {"rope_type": "llama3", "rope_theta": theta, "factor": 8.0, "low_freq_factor": 1.0}
    expected |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, rope_parameters=expected)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** -(torch.arange(0, head_dim, 2) / head_dim)
    factors = (plain / scaled).tolist()
    assert rope_parameters(factors, theta, head_dim) == pytest.approx(expected)
    with pytest.raises(GgufError, match="rope_freqs"):
        rope_parameters([2 * each for each in factors], theta, head_dim)
