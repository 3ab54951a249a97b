from pathlib import Path

import numpy as np
import pytest
import torch

from tests.adapters.fixtures import HIDDEN, SHAPES, make_tensors, tensor_key, write_adapter
from toppings.adapters.checkpoint import read_checkpoint
from toppings.adapters.errors import AdapterError
from toppings.adapters.packed import PackedAdapter, PackedFileError, check_packed, pack_adapter, pack_weights


@pytest.fixture
def packed_file(tmp_path: Path) -> Path:
    checkpoint = read_checkpoint(write_adapter(tmp_path / "a", modules=("q_proj", "up_proj")), SHAPES)
    pack_adapter(checkpoint, "bfloat16", tmp_path / "a.pack")
    return tmp_path / "a.pack"


def read_all(file: Path) -> bytes:
    with PackedAdapter.open(file) as packed:
        blocks = [np.empty(packed.layout.layer_bytes(i), np.uint8) for i in range(packed.layout.num_layers)]
        for layer, block in enumerate(blocks):
            packed.read_layer(layer, block)
        return b"".join(block.tobytes() for block in blocks)


def test_layers_are_read_back_as_they_were_packed(packed_file: Path, tmp_path: Path) -> None:
    layout, blocks = pack_weights(read_checkpoint(tmp_path / "a", SHAPES), "bfloat16")
    assert read_all(packed_file) == blocks.view(torch.uint8).numpy().tobytes()
    assert check_packed(packed_file).layout == layout


def test_scale_is_applied_in_fp32_before_the_one_rounding(tmp_path: Path) -> None:
    tensors = make_tensors(rank=3)
    write_adapter(tmp_path, rank=3, lora_alpha=7, tensors=tensors)
    layout, blocks = pack_weights(read_checkpoint(tmp_path, SHAPES), "bfloat16")
    layer = layout.layers[0]
    b = blocks[layer.b_offsets[0] :][: 3 * HIDDEN].view(3, HIDDEN)
    expected = (tensors[tensor_key(0, "q_proj", "B")] * (7 / 3)).to(torch.bfloat16).T
    assert torch.equal(b, expected)


@pytest.mark.parametrize(("half", "value"), [("A", 1e6), ("B", 40000.0)])
def test_overflow_of_the_dtype_is_refused(tmp_path: Path, half: str, value: float) -> None:
    tensors = make_tensors()
    tensors[tensor_key(1, "q_proj", half)][0, 0] = value
    write_adapter(tmp_path, tensors=tensors)
    checkpoint = read_checkpoint(tmp_path, SHAPES)
    with pytest.raises(AdapterError, match=r"layer 1 q_proj.*float16"):
        pack_adapter(checkpoint, "float16", tmp_path / "a.pack")
    assert not (tmp_path / "a.pack").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
def test_a_scale_whose_effect_overflows_is_refused(tmp_path: Path, stored: torch.dtype, dtype: str) -> None:
    tensors = {key: tensor.to(stored) for key, tensor in make_tensors().items()}
    write_adapter(tmp_path, tensors=tensors, lora_alpha=1e30)
    with pytest.raises(AdapterError, match=r"layer 0 q_proj (gives products|holds).*scale of 2.5e\+29"):
        pack_adapter(read_checkpoint(tmp_path, SHAPES), dtype, tmp_path / "a.pack")


def test_an_adapter_without_effect_may_have_any_scale(tmp_path: Path) -> None:
    tensors = {key: tensor * ("lora_A" in key) for key, tensor in make_tensors().items()}
    write_adapter(tmp_path, tensors=tensors, lora_alpha=1e30)
    pack_adapter(read_checkpoint(tmp_path, SHAPES), "bfloat16", tmp_path / "a.pack")


def test_a_header_holds_the_adapters_own_chat_template(tmp_path: Path) -> None:
    (write_adapter(tmp_path) / "chat_template.jinja").write_text("{{ messages }} é")
    pack_adapter(read_checkpoint(tmp_path, SHAPES), "float32", tmp_path / "a.pack")
    assert check_packed(tmp_path / "a.pack").chat_template == "{{ messages }} é"


def test_file_is_the_same_whatever_the_adapter_is_called(packed_file: Path, tmp_path: Path) -> None:
    (tmp_path / "a").rename(tmp_path / "other")
    checkpoint = read_checkpoint(tmp_path / "other", SHAPES)
    pack_adapter(checkpoint, "bfloat16", tmp_path / "other.pack")
    assert packed_file.read_bytes() == (tmp_path / "other.pack").read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.999])
def test_shortened_file_is_not_opened(packed_file: Path, share: float) -> None:
    data = packed_file.read_bytes()
    packed_file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(PackedFileError):
        PackedAdapter.open(packed_file)


def test_lengthened_file_is_not_opened(packed_file: Path) -> None:
    packed_file.write_bytes(packed_file.read_bytes() + b"\0")
    with pytest.raises(PackedFileError, match="instead of"):
        PackedAdapter.open(packed_file)


def test_any_flipped_byte_that_matters_is_found(packed_file: Path) -> None:
    data = bytearray(packed_file.read_bytes())
    original = read_all(packed_file)
    for position in range(0, len(data), 37):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        packed_file.write_bytes(damaged)
        try:
            assert read_all(packed_file) == original  # only the padding behind the header is unchecked
        except PackedFileError:
            continue


def test_flipped_byte_in_a_block_names_the_layer(packed_file: Path) -> None:
    data = bytearray(packed_file.read_bytes())
    data[-1] ^= 1
    packed_file.write_bytes(data)
    with PackedAdapter.open(packed_file) as packed:
        packed.read_layer(0, np.empty(packed.layout.layer_bytes(0), np.uint8))
        with pytest.raises(PackedFileError, match="layer 2"):
            packed.read_layer(2, np.empty(packed.layout.layer_bytes(2), np.uint8))


def test_missing_file_is_reported_as_such(tmp_path: Path) -> None:
    with pytest.raises(PackedFileError, match="cannot open"):
        PackedAdapter.open(tmp_path / "none.pack")
