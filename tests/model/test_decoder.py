from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gate import NO_TRITON
from tests.model.checkpoints import VARIANTS, build, new_cache, reference_logits, run, save
from tests.tolerances import rms
from toppings.model.config import ModelConfig
from toppings.model.decoder import Decoder
from toppings.ops import dispatch
from toppings.ops.attention import AttentionMetadata

IDS = torch.randint(0, 97, (50,), generator=torch.Generator().manual_seed(2)).tolist()
SPLITS = {
    "whole": [50],
    "chunked": [17, 18, 33, 50],
    "token by token": list(range(1, 51)),
}
NEWER = ["gemma2", "gemma3", "phi3-partial", "olmo2", "granite", "smollm3"]
FP32: dict[str, Any] = {"rtol": 0.0, "atol": 1e-4}


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_logits_are_those_of_transformers_however_the_prompt_is_split(
    variant: str, tmp_path: Path
) -> None:
    model = build(variant)
    decoder = Decoder.load(save(model, tmp_path), dtype=torch.float32)
    expected = reference_logits(model, IDS)
    for cuts in SPLITS.values():
        torch.testing.assert_close(run(decoder, IDS, cuts), expected, **FP32)


@pytest.mark.parametrize(
    "variant", ["llama", "qwen2-window", "qwen3", "gemma2", "phi3-partial", "olmo2", "gpt-oss"]
)
def test_without_numba_the_logits_are_the_same(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "USE_NUMBA", False)
    model = build(variant)
    decoder = Decoder.load(save(model, tmp_path), dtype=torch.float32)
    for cuts in SPLITS.values():
        torch.testing.assert_close(run(decoder, IDS, cuts), reference_logits(model, IDS), **FP32)


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason=NO_TRITON)
def test_in_the_gpus_kernels_sinks_and_biased_experts_give_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = build("gpt-oss"), IDS[:24]
    save(model, tmp_path)
    monkeypatch.setattr(dispatch, "TRITON_DEVICES", ("cpu",))
    decoder = Decoder.load(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(run(decoder, ids, [14, 15, 24]), reference_logits(model, ids), **FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen2", "qwen3", *NEWER])
def test_half_precision_is_as_near_to_fp32_as_transformers_is(
    variant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = build(variant, dtype)
    decoder = Decoder.load(save(model, tmp_path))
    exact = reference_logits(build(variant, dtype).float(), IDS)
    theirs = rms(reference_logits(model, IDS) - exact)
    for cuts in SPLITS.values():
        assert rms(run(decoder, IDS, cuts) - exact) < 1.25 * theirs


@pytest.mark.parametrize("variant", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_experts_in_half_precision_are_as_near_to_fp32_as_transformers_are(
    variant: str, tmp_path: Path
) -> None:
    """Of the median position: where two experts are nearly equal, rounding decides which is taken."""

    def error(logits: torch.Tensor) -> float:
        return (logits - exact).square().mean(-1).sqrt().median().item()

    model = build(variant, torch.bfloat16)
    decoder = Decoder.load(save(model, tmp_path))
    exact = reference_logits(build(variant, torch.bfloat16).float(), IDS)
    for cuts in SPLITS.values():
        assert error(run(decoder, IDS, cuts)) < 1.25 * error(reference_logits(model, IDS))


def test_with_longropes_other_frequencies_long_sequences_are_those_of_transformers(tmp_path: Path) -> None:
    model = build("phi3-longrope")
    save(model, tmp_path)
    ids = [*IDS, *IDS]
    config = ModelConfig.from_checkpoint(tmp_path).for_length(len(ids))
    decoder = Decoder.load(tmp_path, config=config, dtype=torch.float32)
    for cuts in ([100], [40, 63, 64, 65, 100]):
        torch.testing.assert_close(run(decoder, ids, cuts)[-1], reference_logits(model, ids)[-1], **FP32)


def test_greedy_tokens_are_those_of_generate(tmp_path: Path) -> None:
    model = build("llama-llama3")
    decoder = Decoder.load(save(model, tmp_path), dtype="float32")
    prompt = torch.tensor([IDS[:12]])
    expected = model.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)[0].tolist()
    ids = IDS[:12]
    for _ in range(20):
        ids.append(int(run(decoder, ids)[-1].argmax()))
    assert ids == expected


def test_sequences_of_one_step_do_not_see_each_other(tmp_path: Path) -> None:
    """Two decodes, a prompt's second chunk and a fresh prompt, in one forward."""
    model = build("mistral-window")
    decoder = Decoder.load(save(model, tmp_path), dtype=torch.float32)
    cache = new_cache(decoder, 12)
    sequences = [IDS[:20], IDS[5:38], IDS[10:30], IDS[3:12]]
    computed = [19, 32, 7, 0]
    tables = torch.tensor([[4, 0, 0], [1, 9, 3], [2, 8, 0], [11, 0, 0]], dtype=torch.int32)
    tables[0, 1] = 7

    def forward(spans: list[tuple[int, int, int]], num_decodes: int) -> torch.Tensor:
        positions = [torch.arange(start, stop) for _, start, stop in spans]
        slots = [
            tables[s].long()[p // cache.page_size] * cache.page_size + p % cache.page_size
            for (s, _, _), p in zip(spans, positions)
        ]
        ends = [sum(len(p) for p in positions[: i + 1]) for i in range(len(spans))]
        meta = AttentionMetadata(
            num_decodes,
            [0, *ends],
            [stop for _, _, stop in spans],
            tables[[s for s, _, _ in spans]],
            torch.cat(slots),
            cache.page_size,
        )
        ids = torch.tensor([token for s, start, stop in spans for token in sequences[s][start:stop]])
        return decoder.forward(ids, torch.cat(positions), cache, meta, torch.tensor(ends) - 1)

    for s, length in enumerate(computed):
        if length:
            forward([(s, 0, length)], 0)
    together = forward([(s, computed[s], len(ids)) for s, ids in enumerate(sequences)], 2)
    expected = torch.stack([reference_logits(model, ids)[-1] for ids in sequences])
    torch.testing.assert_close(together, expected, **FP32)
