"""Adapters in the decoder against peft, each row of one mixed step against its own adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.model.checkpoints import build, new_cache, save
from toppings.core import GROUPS, MODULES
from toppings.model.decoder import Decoder
from toppings.ops import dispatch
from toppings.ops.attention import AttentionMetadata
from toppings.ops.lora import LoraSegments, add_lora_

ADAPTERS = {
    "wide": LoraConfig(r=64, lora_alpha=32, target_modules=list(MODULES)),
    "narrow": LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
    "stable": LoraConfig(
        r=16, lora_alpha=8, use_rslora=True, target_modules=["k_proj", "o_proj", "down_proj"]
    ),
    "ragged": LoraConfig(
        r=4, lora_alpha=4, rank_pattern={"up_proj": 17}, target_modules=["gate_proj", "up_proj"]
    ),
}
PROMPT = torch.randint(0, 97, (45,), generator=torch.Generator().manual_seed(4)).tolist()


class PoolLora:
    """The adapters of a peft model in an arena of their own."""

    def __init__(self, model: Any, decoder: Decoder) -> None:
        self._offsets = decoder.config.group_out_offsets()
        self.segments = LoraSegments([0], [])
        blocks: list[Tensor] = []
        self.table = torch.zeros(len(ADAPTERS), decoder.config.num_layers, 7, 3, dtype=torch.int64)
        used = 0
        for slot, name in enumerate(ADAPTERS):
            for layer, block in enumerate(model.base_model.model.model.layers):
                found = [
                    (m, projection)
                    for m, module in enumerate(MODULES)
                    for projection in [getattr(block.self_attn, module, None) or getattr(block.mlp, module)]
                    if name in getattr(projection, "lora_A", {})
                ]
                for half in (0, 1):
                    for module, projection in found:
                        a, b = projection.lora_A[name].weight, projection.lora_B[name].weight
                        values = a if half == 0 else b.t() * projection.scaling[name]
                        self.table[slot, layer, module, half] = used
                        self.table[slot, layer, module, 2] = a.shape[0]
                        blocks.append(values.detach().flatten())
                        used += values.numel()
        self.arena = torch.cat(blocks)

    def start(self, layer: int, group: str, x: Tensor) -> None:
        self._started = (layer, group, x.clone())

    def finish(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        assert self._started[:2] == (layer, group)
        assert torch.equal(self._started[2], x)
        add_lora_(
            y,
            x,
            arena=self.arena,
            table=self.table,
            layer=layer,
            group=GROUPS[group],
            out_offsets=self._offsets[group],
            segments=self.segments,
        )


@pytest.fixture(params=[True, False], ids=["kernel", "torch"])
def use_numba(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "USE_NUMBA", request.param and dispatch.HAS_NUMBA)


@pytest.mark.usefixtures("use_numba")
def test_each_row_of_a_mixed_step_is_what_peft_gives_with_its_adapter_alone(tmp_path: Path) -> None:
    decoder = Decoder.load(save(build("llama"), tmp_path))
    model = with_adapters(build("llama"))
    lora = PoolLora(model, decoder)
    # (adapter or base, tokens computed before, tokens in all); decodes first, sorted by adapter
    plan = [
        (-1, 19, 20),
        (0, 30, 31),
        (0, 12, 13),
        (3, 44, 45),
        (-1, 0, 18),
        (1, 0, 45),
        (2, 7, 9),
        (3, 5, 40),
    ]
    cache = new_cache(decoder, 4 * len(plan))
    for s, (adapter, computed, _) in enumerate(plan):
        if computed:
            lora.segments = LoraSegments([0, computed], [adapter])
            forward(decoder, cache, lora, [(s, 0, computed)], 0)
    ends = [sum(stop - start for _, start, stop in plan[: i + 1]) for i in range(len(plan))]
    lora.segments = LoraSegments([0, *ends], [adapter for adapter, _, _ in plan])
    logits = forward(decoder, cache, lora, [(s, a, b) for s, (_, a, b) in enumerate(plan)], 4)
    expected = torch.stack([peft_logits(model, adapter, PROMPT[:stop]) for adapter, _, stop in plan])
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
    base = torch.stack([peft_logits(model, -1, PROMPT[:stop]) for _, _, stop in plan])
    has_adapter = torch.tensor([adapter >= 0 for adapter, _, _ in plan])
    assert ((logits - base).abs().amax(1) > 0.05).equal(has_adapter)  # the adapters do something


def with_adapters(model: Any) -> Any:
    torch.manual_seed(9)
    first, *others = ADAPTERS
    wrapped = get_peft_model(model, ADAPTERS[first], adapter_name=first)
    for name in others:
        wrapped.add_adapter(name, ADAPTERS[name])
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return wrapped.eval()


@torch.inference_mode()
def peft_logits(model: Any, adapter: int, ids: list[int]) -> Tensor:
    """The last position's."""
    if adapter < 0:
        with model.disable_adapter():
            logits: Tensor = model(torch.tensor([ids])).logits[0, -1]
        return logits
    model.set_adapter(list(ADAPTERS)[adapter])
    adapted: Tensor = model(torch.tensor([ids])).logits[0, -1]
    return adapted


def forward(
    decoder: Decoder, cache: Any, lora: PoolLora, spans: list[tuple[int, int, int]], num_decodes: int
) -> Tensor:
    """Logits after the last token of each span (sequence, from, to); sequence s has pages 4s to 4s + 3."""
    positions = [torch.arange(start, stop) for _, start, stop in spans]
    slots = torch.cat([4 * s * cache.page_size + p for (s, _, _), p in zip(spans, positions)])
    ends = [sum(len(p) for p in positions[: i + 1]) for i in range(len(spans))]
    tables = torch.tensor([[4 * s + page for page in range(4)] for s, _, _ in spans], dtype=torch.int32)
    meta = AttentionMetadata(
        num_decodes, [0, *ends], [stop for _, _, stop in spans], tables, slots, cache.page_size
    )
    ids = torch.cat([torch.tensor(PROMPT)[p] for p in positions])
    return decoder.forward(ids, torch.cat(positions), cache, meta, torch.tensor(ends) - 1, lora)
