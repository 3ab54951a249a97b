"""Structured output: are answers what their schemas accept, what do masks cost, and what is refused how soon.

    python benchmarks/structured_output.py               # 500 random schemas, masks, throughput
    python benchmarks/structured_output.py --suite DIR   # and the JSON Schema Test Suite's draft2020-12/
    python benchmarks/structured_output.py --toy

Answers of the built-in demo are judged by the package jsonschema. Masks are those of the real model's
vocabulary where it is installed (`--model` names another), along random outputs. Throughput is that of 8
requests at once: a schema whose answers never end, against free text, in turns. Times are of processors, so
that what else runs counts little; of a throughput, all that the engine takes, with the threads that make
masks. Says on standard error what it is at. Ends in one JSON line with the aims: all answers valid, mask p99
below 1 ms, 0.95 of free text's throughput, refusals within 1.5 s of a processor.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from hostile.results import aim, finish
from jsonschema import Draft202012Validator, FormatChecker
from structured.refused import REFUSED
from structured.schemas import random_schema

from toppings import LLM, SamplingParams, Structure, StructureKind
from toppings.bad_input import RequestError
from toppings.config import EngineConfig
from toppings.core import FinishReason
from toppings.engine.engine import Engine
from toppings.grammar.compiler import Compiler
from toppings.grammar.guide import Guide
from toppings.lab.engines import running_engine
from toppings.lab.machine import describe_machine
from toppings.lab.script import make_parser, parse
from toppings.llm import Completion
from toppings.messages import AddRequest
from toppings.model.config import ModelConfig
from toppings.ops.token_mask import flags_of
from toppings.sandbox.grammars import byte_vocabulary, check, matcher_of
from toppings.sources.models import find_model
from toppings.text import TextModel

MAX_TOKENS = 500
NUM_AT_ONCE = 8
MASK_STEPS = 150
ENDLESS = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
            "size": {"enum": ["small", "medium", "large"]},
        },
        "required": ["name", "age", "tags", "size"],
        "additionalProperties": False,
    },
}


def main() -> int:
    parser = make_parser(__doc__, "few schemas and tokens")
    parser.add_argument("--suite", type=Path, help="the suite's folder of draft2020-12")
    parser.add_argument("--model", default="", help="whose vocabulary and throughput (as `toppings serve`)")
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer of the throughput")
    parser.add_argument("--rounds", type=int, default=7)
    args = parse(parser)
    if args.toy:
        args.schemas, args.tokens, args.rounds, args.model = 4, 8, 1, "demo"
    path = find_model(args.model).path
    names = list(REFUSED)[:5] if args.toy else list(REFUSED)
    parts: dict[str, Callable[[], Any]] = {
        "answers": lambda: answers(args.schemas),
        "masks": lambda: masks(path, 3 if args.toy else 60),
        "throughput": lambda: throughput(path, args.tokens, args.rounds),
        "refusals": lambda: refusals(names),
        **({"suite": lambda: suite(args.suite)} if args.suite else {}),
    }
    result: dict[str, Any] = {"benchmark": "structured_output", "machine": describe_machine()}
    for name, measure in parts.items():
        progress(name)
        result[name] = measure()
    result["aims"] = [] if args.toy else judge(result)
    return finish(result, args.json)


def progress(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    masks, refused = result["masks"]["mask_ms"], result["refusals"]
    return [
        aim("answers that are not valid", result["answers"]["schemas"] - result["answers"]["valid"], 0),
        aim("mask p99, ms", masks["p99"], 1.0),
        aim(
            "free text's throughput over that of structured text", 1 / result["throughput"]["ratio"], 1 / 0.95
        ),
        aim("bad structures that were accepted", len(refused["accepted"]), 0),
        aim("longest refusal, s of a processor", refused["ms"]["max"] / 1e3, 1.5),
    ]


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    places = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: round(1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * part))], 4)
        for name, part in places.items()
    }


def answers(num_schemas: int) -> dict[str, Any]:
    """Of the demo, to random schemas."""
    schemas = [random_schema(seed) for seed in range(num_schemas)]
    with tempfile.TemporaryDirectory(prefix="toppings-structured-") as home:
        settings = {"state_dir": home, "max_num_seqs": 32, "max_model_len": 600, "kv_cache_bytes": "64MB"}
        with LLM("demo", **settings) as llm:

            def answer(seed: int) -> Completion:
                structure = Structure(StructureKind.JSON_SCHEMA, json.dumps(schemas[seed]))
                params = SamplingParams(max_tokens=MAX_TOKENS, seed=seed, structure=structure)
                return llm.generate("Describe a ship as JSON:\n", params)[0]

            with ThreadPoolExecutor(32) as threads:
                made = list(threads.map(answer, range(num_schemas)))
    ends = Counter(str(each.finish_reason) for each in made)
    invalid = [
        {"seed": seed, "text": each.text[-200:]}
        for seed, each in enumerate(made)
        if each.finish_reason != FinishReason.STOP or not _is_valid(schemas[seed], each.text)
    ]
    valid = num_schemas - len(invalid)
    return {"schemas": num_schemas, "valid": valid, "ends": dict(ends), "invalid": invalid[:10]}


def _is_valid(schema: Any, text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return bool(Draft202012Validator(schema, format_checker=FormatChecker()).is_valid(value))


def masks(path: Path, num_schemas: int) -> dict[str, Any]:
    """Compiling, and a mask for each token of random outputs."""
    model = ModelConfig.from_checkpoint(path)
    compiler = Compiler(path, model.vocab_size, model.eos_token_ids)
    rng = random.Random(0)
    start = time.perf_counter()
    compiler.load().result()
    loaded_s = time.perf_counter() - start
    schemas = [ENDLESS, {"type": "object"}, *(random_schema(seed) for seed in range(num_schemas))]
    compile_s, mask_s = [], []
    for schema in schemas:
        start = time.perf_counter()
        structure = Structure(StructureKind.JSON_SCHEMA, json.dumps(schema))
        guide = Guide(compiler.compile(structure).result(), model.vocab_size)
        compile_s.append(time.perf_counter() - start)
        output: list[int] = []
        for _ in range(MASK_STEPS):
            began = time.thread_time()
            mask = guide.mask(output)
            mask_s.append(time.thread_time() - began)
            output.append(int(rng.choice(np.flatnonzero(flags_of(mask, model.vocab_size)))))
            if output[-1] in model.eos_token_ids:
                break
    compiler.close()
    return {
        "vocab_size": model.vocab_size,
        "vocabulary_s": round(loaded_s, 3),
        "num_masks": len(mask_s),
        "compile_ms": quantiles(compile_s),
        "mask_ms": quantiles(mask_s),
    }


def throughput(path: Path, num_tokens: int, num_rounds: int) -> dict[str, Any]:
    """Tokens a second of `NUM_AT_ONCE` requests, in turns; the ratio is the median of the rounds' with their
    neighbours: each is between two of the other kind."""
    free = SamplingParams(max_tokens=num_tokens, seed=1, ignore_eos=True)
    structure = Structure(StructureKind.JSON_SCHEMA, json.dumps(ENDLESS))
    held = SamplingParams(max_tokens=num_tokens, seed=1, structure=structure)
    text = TextModel.load(path)
    prompts = [text.encode(f"Write a list of people in city {i} as JSON:\n") for i in range(NUM_AT_ONCE)]
    text.close()
    rates: dict[str, list[float]] = {"free": [], "structured": []}
    with tempfile.TemporaryDirectory(prefix="toppings-structured-") as home:
        config = EngineConfig(model=str(path), state_dir=home, max_model_len=1024, kv_cache_bytes=256 * 2**20)
        with running_engine(config) as engine:
            for number in range(num_rounds + 1):
                for name, params in (("free", free), ("structured", held)):
                    rate = tokens_per_s(engine, prompts, params)
                    if number:  # the first warms up, and compiles
                        rates[name].append(rate)
                progress(f"throughput: round {number} of {num_rounds}, {rates}")
    between = [statistics.fmean(pair) for pair in zip(rates["free"], [*rates["free"][1:], rates["free"][-1]])]
    ratios = [structured / free for structured, free in zip(rates["structured"], between)]
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    return {
        "model": path.name,
        "tokens_each": num_tokens,
        "tokens_per_processor_s": medians,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def tokens_per_s(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> float:
    """Of all processors."""
    for index, prompt in enumerate(prompts):
        refused = engine.add(AddRequest(str(index), prompt, params))
        assert refused is None, refused
    start, num_tokens = time.process_time(), 0
    while engine.has_requests:
        num_tokens += sum(len(output.token_ids) for output in engine.step())
    return num_tokens / (time.process_time() - start)


def refusals(names: list[str]) -> dict[str, Any]:
    """Processor time of what is tried in a sandbox."""
    accepted, times = [], []
    for name in names:
        refused = REFUSED[name]
        start = time.process_time()
        try:
            structure = Structure(StructureKind(refused.kind), refused.text)
            check(structure_kind=structure.kind, text=structure.text, special_tokens=[], vocab_size=257)
            accepted.append(name)
        except (RequestError, ValueError):
            pass
        times.append(time.process_time() - start)
    return {"kinds": len(names), "accepted": accepted, "ms": quantiles(times)}


def suite(folder: Path) -> dict[str, Any]:
    """Of every schema of the JSON Schema Test Suite: is it compiled, and are its instances judged rightly?"""
    total: Counter[str] = Counter()
    by_keyword: dict[str, dict[str, int]] = {}
    for file in sorted(folder.glob("*.json")):
        progress(f"suite: {file.stem}")
        counts: Counter[str] = Counter()
        for group in json.loads(file.read_text()):
            counts["schemas"] += 1
            try:
                text = check(
                    structure_kind="json_schema",
                    text=json.dumps(group["schema"]),
                    special_tokens=[],
                    vocab_size=257,
                )
            except ValueError:
                continue
            verdicts = [(each["valid"], _allows(text, each["data"])) for each in group["tests"]]
            counts["compiled"] += 1
            counts["allow_invalid"] += any(allowed and not valid for valid, allowed in verdicts)
            counts["exact"] += all(allowed == valid for valid, allowed in verdicts)
        by_keyword[file.stem] = dict(counts)
        total += counts
    names = ("schemas", "compiled", "allow_invalid", "exact")
    return {**{name: total[name] for name in names}, "by_keyword": by_keyword}


def _allows(text: str, value: Any) -> bool:
    matcher = matcher_of(byte_vocabulary([]), "json_schema", text)
    tokens = list(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


if __name__ == "__main__":
    sys.exit(main())
