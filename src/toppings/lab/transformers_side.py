"""What transformers and PEFT do with the requests that are measured: greedy, so many tokens each."""

from collections.abc import Sequence
from typing import Any

import torch


def generate(
    model: Any, prompts: Sequence[Sequence[int]], num_tokens: int, adapters: Sequence[str] | None = None
) -> list[list[int]]:
    """The tokens that `model` (transformers' or PEFT's) appends to prompts of one length, exactly
    `num_tokens` each. `adapters`: of a PEFT model with several, one name a prompt, in one mixed batch."""
    ids = torch.tensor(prompts, device=model.device)
    options = {} if adapters is None else {"adapter_names": list(adapters)}
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            **options,
        )
    tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
    assert all(len(row) == num_tokens for row in tokens)
    return tokens
