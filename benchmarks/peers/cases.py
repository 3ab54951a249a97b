"""Who stands in the comparison, and what each is asked."""

from dataclasses import dataclass, field
from typing import Any

import torch

NUM_REQUESTS = 8
SHORT, LONG = 128, 512
ONE, LONG_ONE, EIGHT, ADAPTERS = "one", "one_512", "eight", "eight_adapters"


@dataclass(frozen=True)
class Case:
    num_prompts: int
    prompt_len: int
    has_adapters: bool = False

    def prompts(self) -> list[list[int]]:
        return [prompt(seed, self.prompt_len) for seed in range(self.num_prompts)]


CASES = {
    ONE: Case(1, SHORT),
    LONG_ONE: Case(1, LONG),
    EIGHT: Case(NUM_REQUESTS, SHORT),
    ADAPTERS: Case(NUM_REQUESTS, SHORT, has_adapters=True),
}


@dataclass(frozen=True)
class Competitor:
    """`module`: the script in this folder; `environment`: whose Python runs it, "" ours; `gguf`: the type of
    the file that it reads, "" the checkpoint itself."""

    module: str
    settings: dict[str, Any] = field(default_factory=dict)
    environment: str = ""
    gguf: str = ""
    cases: tuple[str, ...] = tuple(CASES)


VLLM, LLAMA = "vllm", "llama"
BARE = (ONE, LONG_ONE, EIGHT)
BF16, FP32 = {"dtype": "bfloat16"}, {"dtype": "float32"}


def _ours(**settings: str) -> Competitor:
    fixed = {"kv_cache_bytes": "512MiB", "enable_prefix_caching": "off", "heartbeat_timeout_s": 60}
    return Competitor("with_toppings", {**fixed, **settings})


def _vllm(settings: dict[str, str], *cases: str) -> Competitor:
    return Competitor("with_vllm", settings, VLLM, cases=cases)


def _llama(kind: str, *cases: str) -> Competitor:
    return Competitor("with_llama_cpp", environment=LLAMA, gguf=kind, cases=cases or tuple(CASES))


COMPETITORS = {
    "ours_bf16": _ours(**BF16),
    "ours_fp32": _ours(**FP32),
    "ours_int8": _ours(**BF16, quantization="int8"),
    "ours_int4": _ours(**BF16, quantization="int4"),
    "peft_bf16": Competitor("with_peft", BF16),
    "peft_fp32": Competitor("with_peft", FP32),
    "vllm_bf16": _vllm(BF16, *BARE),
    "vllm_fp32": _vllm(FP32, *BARE),
    "vllm_bf16_lora": _vllm(BF16, ADAPTERS),  # engines of their own: with adapters vLLM compiles no graph
    "vllm_fp32_lora": _vllm(FP32, ADAPTERS),
    "llama_f16": _llama("F16"),
    "llama_bf16": _llama("BF16", *BARE),
    "llama_q8_0": _llama("Q8_0"),
}
REFERENCE = "peft_fp32"
"""Whose first tokens those of the others are held against."""


def prompt(seed: int, num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(10, 500, (num_tokens,), generator=generator).tolist()
    return ids
