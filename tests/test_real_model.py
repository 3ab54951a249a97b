"""The real model and all its adapters in one batch, token by token as transformers and PEFT draw them."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tasks import TASKS
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engine.driver import drive
from toppings.demo import real_adapters_dir
from toppings.sources.models import REAL_NAME, find_model

NUM_TOKENS = 10
ADAPTERS = {path.name: path for path in sorted((real_adapters_dir() or Path()).iterdir()) if path.is_dir()}


def prompts(tokenizer: Any) -> dict[str, list[int]]:
    """A held-out chat of each adapter's job."""
    return {
        name: tokenizer.apply_chat_template(
            TASKS[name].messages(TASKS[name].held_out(1)[0]), add_generation_prompt=True, return_dict=False
        )
        for name in ADAPTERS
    }


@torch.inference_mode()
def expected(model: Any, name: str, prompt: list[int], tokens: list[int]) -> list[int]:
    """What transformers and PEFT draw after the prompt and after each of `tokens` but the last: if these are
    `tokens`, greedy decoding gives them, and else not."""
    model.set_adapter(name)
    logits = model(input_ids=torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    drawn: list[int] = logits.argmax(dim=-1).tolist()
    return drawn


def test_all_adapters_in_one_batch_stream_the_tokens_of_transformers_and_peft(tmp_path: Path) -> None:
    found = find_model()
    assert found.name == REAL_NAME  # the set-up installs it
    asked = prompts(AutoTokenizer.from_pretrained(found.path))
    streamed: dict[str, list[int]] = {name: [] for name in asked}
    with drive(found.path, tmp_path, ADAPTERS, kv_cache_bytes=64 * 2**20) as driver:
        for name, prompt in asked.items():
            driver.add(name, prompt, NUM_TOKENS, adapter=name)
        sizes: Counter[int] = Counter()
        while driver.engine.has_requests:
            outputs = driver.step()
            if not outputs:
                time.sleep(0.001)  # adapters are being read
            for output in outputs:
                streamed[output.request_id] += output.token_ids
                assert len(output.token_ids) <= 1
            sizes[len(outputs)] += 1
        assert not driver.errors()
    assert sizes[len(ADAPTERS)] >= NUM_TOKENS // 2  # steps with a row of each
    model = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
    for name, path in ADAPTERS.items():
        if isinstance(model, PeftModel):
            model.load_adapter(path, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, path, adapter_name=name)
    model.eval()
    for name, prompt in asked.items():
        assert streamed[name] == expected(model, name, prompt, streamed[name]), name
    base, first = model.get_base_model(), next(iter(asked))
    with model.disable_adapter():
        alone = base(input_ids=torch.tensor([asked[first]])).logits[0, -1].argmax().item()
    assert alone != streamed[first][0]  # the adapters are no idle ones
