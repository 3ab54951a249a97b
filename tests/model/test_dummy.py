import pytest
import torch

from toppings.model.decoder import Decoder
from toppings.model.dummy import dummy_weights
from toppings.model.named import NAMED_MODELS, named_config
from toppings.model.weights import weight_shapes
from toppings.ops.attention import AttentionMetadata, KVCache

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
PARAMETERS = {  # 10^9, as their publishers count them
    "llama-2-7b": 6.74,
    "llama-2-13b": 13.02,
    "llama-2-70b": 68.98,
    "llama-3.1-8b": 8.03,
    "qwen3-8b": 8.19,
}


@pytest.mark.parametrize("name", NAMED_MODELS)
def test_named_shapes_have_the_published_number_of_parameters(name: str) -> None:
    shapes = weight_shapes(named_config(name)).values()
    total = sum(torch.Size(shape).numel() for shape in shapes)
    assert total / 1e9 == pytest.approx(PARAMETERS[name], abs=0.006)


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no shape is named 'llama-9'; choose one of llama-2-7b, "):
        named_config("llama-9")


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-8b"])
def test_dummy_weights_run_and_keep_activations_near_one(name: str) -> None:
    config = named_config(name, **TINY)
    decoder = Decoder(config, dummy_weights(config, torch.float32))
    cache = KVCache.allocate(2, 1, 16, 2, 8, torch.float32, "cpu")
    places = torch.arange(9)
    meta = AttentionMetadata(0, [0, 9], [9], torch.zeros(1, 1, dtype=torch.int32), places, 16)
    logits = decoder.forward(places, places, cache, meta, places)
    assert logits.shape == (9, 64)
    assert 0.3 < logits.std() < 3


def test_the_same_seed_gives_the_same_weights() -> None:
    config = named_config("llama-2-7b", **TINY)
    first, again, other = (dummy_weights(config, torch.bfloat16, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed"], other["embed"])
