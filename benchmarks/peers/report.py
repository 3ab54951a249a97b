"""What the samples say: each side's figures, ratios between them, and the aims."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers.cases import ADAPTERS, EIGHT, LONG, LONG_ONE, NUM_REQUESTS, ONE, REFERENCE
from peers.measuring import Samples
from toppings.lab.aims import Aim, at_least, at_most
from toppings.synth import projection_sizes

Figures = dict[str, dict[str, float]]

TPT, TTFT, LONG_TTFT = "tpt_ms", "ttft_128_ms", "ttft_512_ms"
RATE, ADAPTERS_RATE = "eight_tokens_per_s", "eight_adapters_tokens_per_s"

SAME_BYTES = (("ours_bf16", "llama_f16"), ("ours_bf16", "llama_bf16"), ("ours_int8", "llama_q8_0"))
AIMS = (
    # Ours, a peer, the figure, how they are compared, the limit.
    ("ours_bf16", "vllm_bf16", RATE, "at least", 10.0),
    ("ours_bf16", "vllm_fp32", RATE, "at least", 2.0),
    ("ours_bf16", "vllm_bf16_lora", ADAPTERS_RATE, "at least", 5.0),
    ("ours_bf16", "vllm_fp32_lora", ADAPTERS_RATE, "at least", 5.0),
    ("ours_bf16", "peft_bf16", TPT, "at most", 0.6),
    ("ours_bf16", "peft_bf16", ADAPTERS_RATE, "at least", 3.0),
    ("ours_bf16", "peft_bf16", LONG_TTFT, "at most", 0.85),
    *(
        (ours, llama, figure, how, limit)
        for ours, llama in (
            ("ours_bf16", "llama_f16"),
            ("ours_bf16", "llama_bf16"),
            ("ours_int8", "llama_q8_0"),
        )
        for figure, how, limit in (
            (TPT, "at most", 1.15),
            (TTFT, "at most", 1.2),
            (LONG_TTFT, "at most", 1.2),
            (ADAPTERS_RATE, "at least", 4.0),
        )
    ),
    ("ours_int8", "ours_bf16", TPT, "at most", 0.62),
    ("ours_int4", "ours_bf16", TPT, "at most", 0.45),
)
TPT_OVER_FLOOR, TTFT_OVER_FLOOR, ADAPTERS_OVER_NONE = 1.3, 1.3, 0.85


def figures_of(samples: Samples, num_tokens: int) -> Figures:
    """By side, only what it was asked: milliseconds, and generated tokens a second of wall time."""
    figures: Figures = {}
    for side in dict.fromkeys(name for name, _, _ in samples.seconds):
        found: dict[str, float | None] = {}
        found[TTFT] = first = samples.median_s(side, ONE, 1)
        found[LONG_TTFT] = samples.median_s(side, LONG_ONE, 1)
        whole = samples.median_s(side, ONE, num_tokens)
        found[TPT] = None if first is None or whole is None else (whole - first) / (num_tokens - 1)
        figures[side] = {name: value * 1e3 for name, value in found.items() if value is not None}
        for case, name in ((EIGHT, RATE), (ADAPTERS, ADAPTERS_RATE)):
            if (seconds := samples.median_s(side, case, num_tokens)) is not None:
                figures[side][name] = NUM_REQUESTS * num_tokens / seconds
    return figures


def floors_of(model: Path, limits: dict[str, float]) -> dict[str, float]:
    """Milliseconds that bf16 cannot go below: a token reads once every weight that it multiplies; a prompt's
    products (2 operations a weight and token; 4 x the heads' width for each pair of tokens of which one sees
    the other) run at the faster rate of the library's fp32 and bf16 products."""
    config = json.loads((model / "config.json").read_text())
    sizes, num_layers = projection_sizes(model)
    in_layers = num_layers * sum(num_in * num_out for num_in, num_out in sizes.values())
    output = config["vocab_size"] * config["hidden_size"]
    width = sizes["q_proj"][1]
    scores = num_layers * 4 * width * LONG * (LONG + 1) / 2
    gflops = max(limits["sgemm_gflops"], limits["bf16_gflops"])
    return {
        TPT: 2 * (in_layers + output) / limits["read_gbps"] / 1e6,
        LONG_TTFT: (2 * in_layers * LONG + 2 * output + scores) / gflops / 1e6,
    }


def aims_of(figures: Figures, floors: dict[str, float]) -> list[Aim]:
    """Those whose figures are there."""
    aims = []
    for ours, peer, figure, how, limit in AIMS:
        mine, theirs = (figures.get(side, {}).get(figure) for side in (ours, peer))
        if mine is not None and theirs:
            check = at_most if how == "at most" else at_least
            aims.append(check(f"{figure} of {ours} over {peer}", mine / theirs, limit))
    mine_all = figures.get("ours_bf16", {})
    for figure, limit in ((TPT, TPT_OVER_FLOOR), (LONG_TTFT, TTFT_OVER_FLOOR)):
        if figure in mine_all:
            what = f"{figure} of ours_bf16 over this machine's floor"
            aims.append(at_most(what, mine_all[figure] / floors[figure], limit))
    if RATE in mine_all and ADAPTERS_RATE in mine_all:
        ratio = mine_all[ADAPTERS_RATE] / mine_all[RATE]
        aims.append(at_least("ours_bf16: tokens/s with 8 adapters over without", ratio, ADAPTERS_OVER_NONE))
    return aims


def report(samples: Samples, num_tokens: int, model: Path, told: dict[str, Any]) -> dict[str, Any]:
    figures, floors = figures_of(samples, num_tokens), floors_of(model, samples.limits)
    sides = {
        name: {
            **figures.get(name, {}),
            "samples": {f"{c} x {n}": len(s) for (side, c, n), s in samples.seconds.items() if side == name},
            "first_tokens_as_reference": _agreement(samples, name),
            "told": told[name],
        }
        for name in told
    }
    return {
        "sides": sides,
        "aims": [asdict(aim) for aim in aims_of(figures, floors)],
        "limits": samples.limits,
        "floors_ms": floors,
    }


def _agreement(samples: Samples, side: str) -> dict[str, float]:
    """By case, the share of prompts whose first token is the reference's."""
    return {
        case: _share(samples.first_tokens[side, case], expected)
        for (name, case), expected in samples.first_tokens.items()
        if name == REFERENCE and (side, case) in samples.first_tokens
    }


def _share(found: Sequence[int], expected: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(found, expected)) / len(expected)
