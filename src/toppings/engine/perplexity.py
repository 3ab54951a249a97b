"""What quantising a base model costs in accuracy: its perplexity on a text, stored in each way."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from toppings.config import QUANTIZATIONS, ConfigError, EngineConfig
from toppings.core import BatchItem, Request
from toppings.engine.base import model_config, model_path
from toppings.engine.build import load_decoder, make_cache, set_threads
from toppings.engine.pages import pages_for
from toppings.engine.step_inputs import InputBuilder
from toppings.model.config import ModelConfig
from toppings.model.decoder import Decoder
from toppings.model.tokenizer import load_tokenizer
from toppings.ops.attention import KVCache
from toppings.sampling_params import SamplingParams

WINDOW = 512
"""Tokens that are read in one forward, each predicted from those before it in the window."""


def measure_quantization(config: EngineConfig, text: Path, max_tokens: int) -> dict[str, float]:
    """The perplexity of the model on the first `max_tokens` tokens of a text file, by `QUANTIZATIONS`.

    Raises ConfigError for another device than a CPU, or a text that is not readable or too short; ValueError
    where the model cannot be read.
    """
    if config.device != "cpu":
        raise ConfigError(f"device is {config.device}; quantization is for CPUs")
    set_threads(config)
    model = model_config(config)
    ids = _tokens(config, text, max_tokens)
    found = {}
    for quantization in QUANTIZATIONS:
        each = replace(config, quantization=quantization)
        found[quantization] = perplexity(each, load_decoder(each, model), model, ids)
    return found


def perplexity(config: EngineConfig, decoder: Decoder, model: ModelConfig, ids: list[int]) -> float:
    """e to the mean of -log p of each token given those before it, in windows of WINDOW tokens; each begins
    with the last token of the one before."""
    cache = make_cache(config, model, pages_for(WINDOW, config.page_size), decoder.dtype)
    total = 0.0
    for start in range(0, len(ids) - 1, WINDOW):
        window = ids[start : start + WINDOW + 1]
        logits = _logits(config, decoder, cache, window[:-1])
        chosen = logits.log_softmax(1).gather(1, torch.tensor(window[1:])[:, None])
        total -= float(chosen.double().sum())
    return float(torch.tensor(total / (len(ids) - 1)).exp())


def _logits(config: EngineConfig, decoder: Decoder, cache: KVCache, ids: list[int]) -> Tensor:
    """fp32 [tokens, vocab] of one prompt."""
    request = Request("text", ids, SamplingParams(max_tokens=1))
    request.page_table = list(range(pages_for(len(ids), config.page_size)))
    builder = InputBuilder(config.page_size, None)
    inputs = builder.build([BatchItem(request, len(ids))], list(range(len(ids))), None)
    return decoder.forward(inputs.token_ids, inputs.positions, cache, inputs.meta, inputs.logit_rows)


def _tokens(config: EngineConfig, text: Path, max_tokens: int) -> list[int]:
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the text {text}: {error}") from error
    tokenizer = load_tokenizer(model_path(config))
    ids: list[int] = tokenizer(words, add_special_tokens=False)["input_ids"][:max_tokens]
    if len(ids) < 2:
        raise ConfigError(f"{text} has {len(ids)} tokens; a perplexity needs at least 2")
    return ids
